# SPDX-License-Identifier: Apache-2.0
"""A pipeline's deploy configuration and arguments are checked before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from tandem_protocol.errors import ConfigError
from tandem_worker.omni.arguments import complete
from tandem_worker.omni.deployment import DeployedStage, check_pipeline, check_settings, parse_deployment
from tandem_worker.omni.terms import Stage, StageKind

THINKER = {"stage_id": 0, "devices": "0", "gpu_memory_utilization": 0.8, "default_sampling_params": {"temperature": 0.4, "max_tokens": 64}}
TALKER = {"stage_id": 1, "devices": "1", "gpu_memory_utilization": 0.8}
VOCODER = {"stage_id": 2, "devices": 0, "gpu_memory_utilization": 0.15}


def test_the_stages_are_read() -> None:
    """In the order of their ids, with devices and defaults."""
    edges = [{"from": 0, "to": 1}, {"from": 1, "to": 2}]
    stages = parse_deployment({"async_chunk": False, "stages": [VOCODER, THINKER, TALKER], "edges": edges})
    assert [stage.id for stage in stages] == [0, 1, 2]
    assert stages[0] == DeployedStage(0, (0,), 0.8, {"temperature": 0.4, "max_tokens": 64}, frozenset(THINKER))
    assert parse_deployment({"stages": [{"stage_id": 0, "devices": "0, 1"}]})[0].devices == (0, 1)
    assert parse_deployment({"base_config": "other.yaml"}) == ()


@pytest.mark.parametrize(("config", "sentence"), [
    ([], "must be a YAML mapping"),
    ({}, "has no stages"),
    ({"stage_args": []}, "`stage_args` is the stage configuration of vllm-omni before"),
    ({"stage": []}, "unknown key 'stage' .*: did you mean 'stages'"),
    ({"stages": {}, "model_runner": "v3"}, "model_runner 'v3' does not exist: use v1 or v2"),
    ({"stages": "0"}, "must be a list"),
    ({"stages": [{}]}, "a mapping with a stage_id"),
    ({"stages": [{"stage_id": "0"}]}, "stage_id '0' does not work"),
    ({"stages": [THINKER, {**TALKER, "stage_id": 0}]}, "stage_id 0 is given twice"),
    ({"stages": [{**THINKER, "devices": "cuda:0"}]}, "devices 'cuda:0' of stage 0 does not work"),
    ({"stages": [{**THINKER, "devices": "0,0"}]}, "names a GPU twice"),
    ({"stages": [{**THINKER, "gpu_memory_utilization": 1.2}]}, "gpu_memory_utilization 1.2 of stage 0"),
    ({"stages": [THINKER, {**TALKER, "devices": "0"}]}, r"stages on GPU 0 want more than its memory \(stage 0 0.8, stage 1 0.8\)"),
    ({"stages": [{**THINKER, "default_sampling_params": [1]}]}, "default_sampling_params of stage 0 must be a mapping"),
    ({"stages": [THINKER], "edges": [{"from": 0, "to": 1}]}, "an edge leads to stage 1, which is not there: stages are 0"),
    ({"stages": [THINKER], "edges": [[0, 1]]}, "an edge is a mapping with from and to"),
    ({"stages": [THINKER, TALKER], "edges": [{"from": 0, "to": 1}, {"from": 1, "to": 0}]}, "the edges lead in a circle"),
])
def test_each_mistake_has_its_sentence(config: Any, sentence: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ConfigError, match=sentence):
        parse_deployment(config)


def test_a_setting_that_no_engine_knows_is_refused() -> None:
    """With the nearest that one knows."""
    stages = parse_deployment({"stages": [THINKER, {**TALKER, "max_num_sequences": 4}]})
    check_settings(stages, {*THINKER, "max_num_sequences"})
    with pytest.raises(ConfigError, match=r"stage 1 .* has an unknown setting 'max_num_sequences': did you mean 'max_num_seqs'"):
        check_settings(stages, {*THINKER, "max_num_seqs"})


def test_a_pipeline_is_what_its_configuration_is_about() -> None:
    """And makes something that can be given out."""
    thinker, silent = Stage(0, StageKind.LLM, "thinker", "text"), Stage(0, StageKind.DIFFUSION)
    check_pipeline((thinker,), (DeployedStage(0),))
    with pytest.raises(ConfigError, match=r"settings for stage 1, which is not there: the pipeline has stage 0 \(thinker\)"):
        check_pipeline((thinker,), (DeployedStage(0), DeployedStage(1)))
    with pytest.raises(ConfigError, match="makes nothing that this model has an output for"):
        check_pipeline((silent,), ())


def test_vllm_omnis_own_configurations_are_taken() -> None:
    """Where it is installed: every deploy configuration that it ships."""
    vllm_omni = pytest.importorskip("vllm_omni", exc_type=ImportError)
    yaml = pytest.importorskip("yaml")
    from tandem_worker.omni.async_omni import stage_settings

    folder = Path(vllm_omni.__file__).parent / "deploy"
    refused = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            check_settings(parse_deployment(yaml.safe_load(path.read_text())), stage_settings())
        except ConfigError as exc:
            refused[path.name] = str(exc)
    assert refused == {}


def test_arguments_come_from_model_json_and_the_settings(tmp_path: Path) -> None:
    """The setting's model wins; a relative deploy configuration is the model folder's; statistics are on, since metrics need them."""
    (tmp_path / "two.yaml").write_text(json.dumps({"stages": [THINKER, TALKER]}))
    given = {"model": "theirs", "deploy_config": "two.yaml", "max_model_len": 256}
    arguments = complete(given, "ours", tmp_path)
    assert (arguments.model, arguments.deploy_config) == ("ours", str(tmp_path / "two.yaml"))
    assert [stage.id for stage in arguments.deployed] == [0, 1]
    assert arguments.engine == {"max_model_len": 256, "log_stats": True}
    assert complete({"model": "theirs", "log_stats": False}, "", tmp_path).engine == {"log_stats": False}


@pytest.mark.parametrize(("given", "sentence"), [
    ({}, "no model given"),
    ({"model": "m", "stage_configs_path": "a.yaml"}, "stage_configs_path is vllm-omni's before 0.20"),
    ({"model": "m", "kv_transfer_config": {}}, "kv_transfer_config does not fit a pipeline"),
    ({"model": "m", "deploy_config": {}}, "must be the path of a YAML file"),
    ({"model": "m", "deploy_config": "absent.yaml"}, "can't be read"),
    ({"model": "m", "deploy_config": "broken.yaml"}, "is not YAML"),
    ({"model": "m", "deploy_config": "wrong.yaml"}, "has no stages"),
])
def test_wrong_arguments_are_refused(given: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """With what to do about them."""
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "wrong.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=sentence):
        complete(given, "", tmp_path)

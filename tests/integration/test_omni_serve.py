# SPDX-License-Identifier: Apache-2.0
"""`tandem serve --omni` as an operator runs it, on a CPU with a platform of the tests, in vllm-omni's own environment."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omni_rig import CPU, environment_with_platform, make_tiny_diffusion, omni_environment
from servers import serve, tandem

pytestmark = pytest.mark.slow

PICTURE = {"num_inference_steps": 2, "height": 64, "width": 48, "seed": 1}
TOKENS = 3
DEPLOY = f"""stages:
  - stage_id: 0
    default_sampling_params: {{max_tokens: {TOKENS}, temperature: 0.0, ignore_eos: true}}
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vllm-omni's, with the CPU platform of the tests."""
    return environment_with_platform(omni_environment(), tmp_path_factory.mktemp("environment"))


def test_a_picture_by_two_commands(environment: Path, tmp_path: Path) -> None:
    """A pipeline of diffusers is served and asked; `status` and the admin port know it like any worker."""
    model = make_tiny_diffusion(environment, tmp_path)
    run = tmp_path / "run"
    arguments = ("--omni", "--omni-env", str(environment), "--model", str(model), "--dtype", "float32",
                 "--diffusion-load-format", "diffusers")
    with serve(run, *arguments, **CPU) as server:
        asked = tandem(run, "generate", "--url", server.grpc_url, "--raw", "--sampling", json.dumps(PICTURE), "--output",
                       str(tmp_path / "cat"), "a cat")
        shown = tandem(run, "status", "--url", server.grpc_url)
        health = server.health("omni")
    assert asked.returncode == 0, asked.stderr
    picture = np.asarray(Image.open(io.BytesIO((tmp_path / "cat.png").read_bytes())))
    assert picture.shape == (PICTURE["height"], PICTURE["width"], 3)
    assert "omni" in shown.stdout
    assert (health["status"], health["role"]) == ("ready", "omni")


def test_a_deploy_configuration_by_dynamos_name(environment: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Its defaults hold, since the command adds none of its own for a pipeline."""
    deploy = tmp_path / "stages.yaml"
    deploy.write_text(DEPLOY)
    arguments = ("--omni", "--omni-env", str(environment), "--model", str(tiny_model), "--stage-configs-path", str(deploy),
                 "--dtype", "float32", "--enforce-eager", "--max-model-len", "256")
    with serve(tmp_path / "run", *arguments, **CPU) as server:
        asked = tandem(tmp_path / "run", "generate", "--url", server.grpc_url, "--raw", "--json", "Hello")
    assert asked.returncode == 0, asked.stderr
    summary = json.loads(asked.stdout.splitlines()[-1])
    assert (summary["model"], summary["num_output_tokens"], summary["finish_reason"]) == ("omni", TOKENS, "length")


def test_a_host_that_can_not_is_told_at_once(tmp_path: Path, tiny_model: Path) -> None:
    """Without a GPU and without a platform for CPUs; nothing is started."""
    omni = omni_environment()
    refused = tandem(tmp_path, "serve", "--omni", "--omni-env", str(omni), "--model", str(tiny_model), timeout_s=60,
                     CUDA_VISIBLE_DEVICES="")
    assert refused.returncode == 2
    assert "vllm-omni runs no stage on a CPU, and this host has no GPU" in refused.stderr
    examined = tandem(tmp_path, "doctor", "--no-nixl", "--json", "--model", str(tiny_model), "--omni-env", str(omni), timeout_s=120)
    [found] = [one for one in json.loads(examined.stdout)["checks"] if one["check"] == "omni"]
    assert found["says"].startswith("vllm-omni runs no stage on a CPU")

# SPDX-License-Identifier: Apache-2.0
"""The launch scripts that a CPU allows, each run as a user runs it, one at a time: their request is answered."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models import make_lora, make_tiny_model
from servers import free_ports, tandem
from vision_models import PLACEHOLDER, make_image, make_vision_model

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
START_S = 570
LIMITS = ("--max-model-len", "1024", "--max-num-seqs", "4", "--max-num-batched-tokens", "256")
pytestmark = pytest.mark.slow


def launch(run_dir: Path, script: str, *arguments: str) -> str:
    """Runs a script on free ports, stops what it started; what it printed to standard output."""
    first = free_ports(20)
    variables = {
        **os.environ, "TANDEM_RUN_DIR": str(run_dir), "TANDEM_ENV": sys.prefix, "TANDEM_PLATFORM": "cpu",
        "TANDEM_URL": f"localhost:{first + 1}", "TANDEM_HTTP": f"localhost:{first}", "DYN_SYSTEM_PORT": str(first + 3),
        "DYN_VLLM_KV_EVENT_PORT": str(first + 8), "VLLM_NIXL_SIDE_CHANNEL_PORT": str(first + 12),
        "TANDEM_ROUTER_ADMIN_PORT": str(first + 16), "TANDEM_CONSOLIDATOR_PORT": str(first + 18), "TANDEM_CONSOLIDATOR_ADMIN_PORT": "0",
        "TANDEM_ROUTER_PORT": str(free_ports(40) + 20), "CPU_CACHE_GB": "0.3",
    }
    ports = ["--http-port", str(first), "--grpc-port", str(first + 1), "--metrics-port", str(first + 2)]
    try:
        done = subprocess.run([LAUNCH / script, *arguments, *ports, *LIMITS], env=variables, capture_output=True, text=True, check=False,
                              timeout=START_S)
    finally:
        stopped = tandem(run_dir, "stop", "--drain-timeout-s", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert stopped.returncode == 0, stopped.stderr
    return done.stdout


@pytest.mark.parametrize(
    "script",
    ["agg.sh", "disagg.sh", "agg_router.sh", "agg_router_approx.sh", "agg_router_replicas.sh", "agg_kvbm.sh", "disagg_kvbm.sh",
     "agg_spec_decoding.sh"],
)
def test_a_script_serves_and_asks(tmp_path: Path, script: str) -> None:
    """The embedded model knows the capital of France, through each path; each router of several does."""
    answers = launch(tmp_path, script)
    assert answers.count("Paris") >= (2 if script == "agg_router_replicas.sh" else 1)
    if script == "agg_kvbm.sh":
        assert '"G2"' in answers


def test_the_router_chooses_between_prefill_and_decode(tmp_path: Path) -> None:
    """With one engine of each kind, not two: the script takes more options, and the last one counts."""
    assert "Paris" in launch(tmp_path, "disagg_router.sh", "--prefill", "1", "--decode", "1")


def test_an_adapter_is_loaded_and_named(tmp_path: Path) -> None:
    """The tiny model with an adapter made for it; its text is noise, but it is an answer."""
    model, adapter = make_tiny_model(tmp_path / "model"), make_lora(tmp_path / "adapter")
    answers = launch(tmp_path / "run", "agg_lora.sh", str(adapter), "--model", str(model))
    assert '"text_output"' in answers
    assert '"error"' not in answers


@pytest.mark.parametrize("script", ["agg_multimodal_epd.sh", "disagg_multimodal_epd.sh"])
def test_an_image_is_asked_about(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' model that takes images, whose text is noise as well."""
    (tmp_path / "image.png").write_bytes(make_image(1))
    monkeypatch.setenv("PLACEHOLDER", PLACEHOLDER)
    monkeypatch.setenv("MODEL", str(make_vision_model(tmp_path / "model")))
    answers = launch(tmp_path / "run", script, str(tmp_path / "image.png"))
    assert '"text_output"' in answers
    assert '"error"' not in answers

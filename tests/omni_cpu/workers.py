# SPDX-License-Identifier: Apache-2.0
"""vllm-omni's model runners before vLLM's CPU runner, and vLLM's CPU worker around them. (Its own worker refuses any device but a GPU.)"""

import inspect
from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.workspace import init_workspace_manager
from vllm_omni.worker.gpu_ar_model_runner import GPUARModelRunner
from vllm_omni.worker.gpu_generation_model_runner import GPUGenerationModelRunner
from vllm_omni.worker.mixins import OmniWorkerMixin


class _Plain(CPUModelRunner):  # type: ignore[misc]
    """vLLM's own models (Llama) take none of the keyword arguments that vllm-omni's runners add."""

    def _model_forward(self, input_ids: Any = None, positions: Any = None, intermediate_tensors: Any = None, inputs_embeds: Any = None,
                       **more: Any) -> Any:
        taken = inspect.signature(self.model.forward).parameters
        if not any(one.kind is one.VAR_KEYWORD for one in taken.values()):
            more = {name: value for name, value in more.items() if name in taken}
        return super()._model_forward(input_ids=input_ids, positions=positions, intermediate_tensors=intermediate_tensors,
                                      inputs_embeds=inputs_embeds, **more)


class CPUARModelRunner(GPUARModelRunner, _Plain):  # type: ignore[misc]
    """Tokens one by one."""


class CPUGenerationModelRunner(GPUGenerationModelRunner, _Plain):  # type: ignore[misc]
    """All at once."""


class _Worker(OmniWorkerMixin, CPUWorker):  # type: ignore[misc]
    model_runner_cls: type

    def init_device(self) -> None:
        self.use_v2_model_runner = False  # which has none of vllm-omni's hooks
        super().init_device()
        init_workspace_manager(self.device, 1)
        self.model_runner = self.model_runner_cls(self.vllm_config, self.device)


class CPUARWorker(_Worker):
    """Of a stage that makes tokens one by one."""

    model_runner_cls = CPUARModelRunner


class CPUGenerationWorker(_Worker):
    """Of a stage that makes its output at once."""

    model_runner_cls = CPUGenerationModelRunner

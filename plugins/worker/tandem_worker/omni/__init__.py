# SPDX-License-Identifier: Apache-2.0
"""The worker that runs a pipeline of vllm-omni: text, images and sound from one model of several stages."""

# SPDX-License-Identifier: Apache-2.0
"""KV blocks beyond GPU memory: host memory, disk and object store for vLLM's offloading framework, and one consolidated event stream."""

# SPDX-License-Identifier: Apache-2.0
"""What every plugin of Tandem must agree on: roles, tensors, handoff, settings and errors."""

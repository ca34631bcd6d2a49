# SPDX-License-Identifier: Apache-2.0
"""A worker's metrics: its requests as it sees them, its own figures, and one exposition of all that the engine exports."""

# SPDX-License-Identifier: Apache-2.0
"""`tandem check-cluster`: what the chosen values need, what the cluster has, and what is missing, with the command that mends it."""

# SPDX-License-Identifier: Apache-2.0
"""`tandem profile`: measures what an engine can do, for the planner."""

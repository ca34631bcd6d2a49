# SPDX-License-Identifier: Apache-2.0
"""Data-parallel ranks of one worker on several hosts: its leader serves all of them, followers run theirs and serve nothing."""

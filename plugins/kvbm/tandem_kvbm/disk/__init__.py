# SPDX-License-Identifier: Apache-2.0
"""G3: blocks in files of one folder, within a quota, found again after a restart."""

# SPDX-License-Identifier: Apache-2.0
"""What the next interval's traffic will be, from those before."""

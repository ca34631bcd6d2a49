# SPDX-License-Identifier: Apache-2.0
"""G4: blocks as objects in a bucket that several workers share."""

# SPDX-License-Identifier: Apache-2.0
"""`tandem doctor`: probes gather facts at the rim, checks judge them, the report tells."""

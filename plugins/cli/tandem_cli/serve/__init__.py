# SPDX-License-Identifier: Apache-2.0
"""`tandem serve`: from options to a running tritonserver with one engine per model."""

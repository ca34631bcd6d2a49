# SPDX-License-Identifier: Apache-2.0
import locale

# The stub embeds a Python that ignores PYTHONUTF8 and LC_ALL; without this, importing torch dies of a UnicodeDecodeError.
locale.setlocale(locale.LC_ALL, "C.UTF-8")

from tandem_worker.omni.triton import TritonPythonModel  # noqa: E402, F401

# SPDX-License-Identifier: Apache-2.0
"""The body of `helm test`: one request, and whether the answer has the expected word. Only the standard library."""

import json
import os
import sys
import urllib.request

body = {"text_input": os.environ["PROMPT"], "stream": False, "max_tokens": 32, "temperature": 0, "exclude_input_in_output": True}
request = urllib.request.Request(os.environ["URL"], data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=float(os.environ["TIMEOUT_S"])) as response:
    text = json.load(response)["text_output"]
print(text)
sys.exit(0 if os.environ["EXPECT"] in text else f"the answer has no {os.environ['EXPECT']!r} in it")

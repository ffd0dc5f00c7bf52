"""How the addresses of objects in stores are spelled."""

from __future__ import annotations

import re

ADDRESS = re.compile(r"(?P<bucket>(?:s3|gs|az)://[^/@:\s]+)(?:/(?P<key>.*))?", re.DOTALL)
SCHEME = re.compile(r"(?:s3|gs|az)://", re.IGNORECASE)

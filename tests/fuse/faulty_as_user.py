"""faulty.py, run by a user who is not root. Runs instead of `python -m cachefs`, as root: RUN_AS is the user's number.

Rights are dropped when everything is imported, because the user may not be able to read where cachefs lies.
"""

from __future__ import annotations

import os
from encodings import utf_8_sig  # noqa: F401 (a configuration is read in it)

import faulty  # noqa: F401 (its layer)

from cachefs import daemon, start  # noqa: F401 (which the command would import later)
from cachefs.cli import main

if __name__ == "__main__":
    user = int(os.environ["RUN_AS"])
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    main()

"""Leaving the pool of tokenising processes early: it must end, also while one of them is sending its rows."""

from __future__ import annotations

import subprocess
import sys

# Long results and a busy reader: at most moments some process is half way through sending one.
LEAVES_EARLY = """
import numpy as np

from peft_study.data.chat import Example
from peft_study.data.conversation import Conversation, Message
from peft_study.data.parallel import encode_rows


class Encoder:
    max_length = 100_000

    def encode_whole(self, conversation):
        return Example(np.zeros(2000, np.int32), np.ones(2000, bool))


for turn in range(10):
    rows = (Conversation(str(n), (Message("user", "hi"),), "s") for n in range(10**6))
    chunks = encode_rows(rows, Encoder(), workers=2)
    for _ in range(3 + turn):
        next(chunks)
        sum(range(300_000))
    chunks.close()
print("left", turn + 1)
"""


def test_leaving_early_ends() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES_EARLY], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("left 10\n", "")

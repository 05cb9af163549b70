"""Run all trials and write the page: `make architectures`."""

import tempfile
from pathlib import Path

import torch

from coppice.core import logs

from . import page, tiny, trial

logs.start_logging()
torch.set_num_threads(1)  # tiny models compute slower with more
with tempfile.TemporaryDirectory() as place:
    results = {title: trial.run(title, Path(place, str(number))) for number, title in enumerate(tiny.ARCHITECTURES)}
page.PAGE.write_text(page.written(results), encoding="utf-8")
print(page.PAGE)

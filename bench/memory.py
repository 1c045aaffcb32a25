"""Peak memory of calibration with 10 and 1,000 batches: `python bench/memory.py`. Promise 12 asks for less than 5 % of difference."""

import importlib.util
import subprocess
import sys
from pathlib import Path

PROMISE = Path(__file__).parents[1] / "tests" / "promises" / "test_12_bounded_memory.py"

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("promise", PROMISE)
    promise = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(promise)
    few, many = (int(subprocess.check_output([sys.executable, "-c", promise.SCRIPT, str(count)], text=True)) for count in (10, 1000))
    print(f"10 batches: {few / 1024:.1f} MiB, 1,000 batches: {many / 1024:.1f} MiB, {100 * (many / few - 1):+.1f} %")

"""Promise 12: calibration takes the same memory whatever the number of batches."""

import subprocess
import sys
import textwrap

SCRIPT = textwrap.dedent("""
    import resource, sys
    import torch
    from torch import nn
    import multum
    from multum.quantize import Static

    class Data:
        def __iter__(self):
            random = torch.Generator().manual_seed(0)
            return ((torch.randn(16, 3, 64, 64, generator=random), torch.zeros(16)) for _ in range(int(sys.argv[1])))

    torch.set_num_threads(1)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 3600, 4))
    task = multum.Task(model, torch.randn(2, 3, 64, 64), calibration=Data())
    multum.compress(task, Static(samples=16 * int(sys.argv[1])))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
""")


def test_many_batches_take_no_more_memory_than_few():
    few, many = (int(subprocess.check_output([sys.executable, "-c", SCRIPT, str(count)], text=True)) for count in (5, 50))
    assert many < 1.05 * few

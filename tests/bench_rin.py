"""How fast is FIT beside the best known open RIN of the same size? One run, one table; not part of the tests.

The peer has dependencies of its own, so give it an environment of its own:

    python -m venv peers
    peers/bin/pip install torch RIN-pytorch==0.8.0 beartype einops pillow tqdm
    peers/bin/pip install -e .
    peers/bin/python tests/bench_rin.py --json rin.json

All read a picture of SIDE x SIDE patches of 4 x 4 pixels through 128 latents of width 128 in 3 blocks with one layer among the latents in each, heads of 64 channels, feed-forwards
four times as wide. Two pairs: as both papers have them (no layers among patches, the noise level as a token), and as RIN-pytorch comes (linear attention among patches, the noise level scales and shifts
every layer: many parameters, hardly any work) beside a FIT with a local layer in groups of 256 patches. FIT's patches are 256 wide without local layers and 192 with them; RIN's width, in steps of 16, is the one
with which it has most nearly as many parameters as the FIT of its pair, position tables aside (FIT learns a row per patch, RIN computes its own from coordinates).
RIN embeds its own last estimate with the picture, FIT also reads a caption of 32 tokens: each does what it must for its task. All networks take turns, round after round. The table gives the median
time of a forward pass and of forward and backward together, per picture, and the ratio to the FIT of the pair. Training: attention that keeps its scores for FIT, and for RIN its own choice."""
import argparse, json, sys, types
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from snapvideo_nb.blocks import plain_attention
from snapvideo_nb.fit import FIT, FITConfig
from snapvideo_nb.scaling import Ledger, example, total
from snapvideo_nb.speed import arithmetic, matrix_rate, quartiles, take_turns
from snapvideo_nb.runs import provenance

count = lambda network: sum(p.numel() for name, p in network.named_parameters() if name != 'position')


def fit(width: int, side: int, local: int):
    "Our FIT on pictures of 4*side pixels."
    return FIT(FITConfig(frames=1, height=4*side, width=4*side, patch=(1, 4, 4), group=(1, 16, 16), patch_width=width, latents=128, latent_width=128, blocks=3, global_layers=1,
                         local_layers=local, patch_head=64, latent_head=64, condition_width=128, text_width=128, dropout=0.))


def rin(width: int, side: int, local: bool):
    "RIN-pytorch's RIN on the same. It imports torchvision, accelerate and ema_pytorch for its trainer alone: empty modules stand in."
    for name in ('torchvision', 'torchvision.transforms', 'torchvision.utils', 'ema_pytorch', 'accelerate'): sys.modules.setdefault(name, types.ModuleType(name))
    vars(sys.modules['torchvision']).update(transforms=sys.modules['torchvision.transforms'], utils=sys.modules['torchvision.utils'])
    vars(sys.modules['accelerate']).update(Accelerator=None, DistributedDataParallelKwargs=None)
    sys.modules['ema_pytorch'].EMA = None
    from rin_pytorch.rin_pytorch import RIN
    return RIN(dim=width, image_size=4*side, patch_size=4, depth=3, latent_self_attn_depth=1, dim_latent=128, num_latents=128, heads=2, dim_head=64, patches_self_attn=local, latent_token_time_cond=not local)


def matched(make, parameters: int) -> int:
    "The width of the patches, a multiple of 16, with which a network has most nearly so many parameters."
    with torch.device('meta'): return min(range(64, 577, 16), key=lambda width: abs(count(make(width)) - parameters))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--side', type=int, nargs='*', default=[16, 32, 64]); parser.add_argument('--batch', type=int, default=16); parser.add_argument('--device', default='cpu')
    parser.add_argument('--precision', choices=('fp32', 'tf32', 'bf16'), default='bf16'); parser.add_argument('--rounds', type=int, default=10); parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--json', type=Path, help='write the result here')
    o = parser.parse_args()
    rows, rate = [], matrix_rate(o.precision, o.device)
    for side in o.side:
        batch = max(1, o.batch*256//side**2)
        makers = {'FIT': lambda w: fit(w, side, 0), 'RIN': lambda w: rin(w, side, False), 'FIT, local layers': lambda w: fit(w, side, 1), 'RIN-pytorch as it comes': lambda w: rin(w, side, True)}
        tasks, found = {}, {}
        for name, make in makers.items():
            ours = name.startswith('FIT')
            width = (256 if name == 'FIT' else 192) if ours else matched(make, found['FIT' if name == 'RIN' else 'FIT, local layers']['parameters'])
            inputs = lambda n: (lambda x, t, told: (x, t, told) if ours else (x[:, :, 0], t))(*example(fit(192, side, 0).config, n, 32, o.device))
            with FakeTensorMode(), torch.no_grad(), Ledger() as book: make(width)(*example(fit(192, side, 0).config, 1, 32)) if ours else make(width)(torch.randn(1, 3, 4*side, 4*side), torch.randn(1))
            network, given = make(width).to(o.device), inputs(batch)
            found[name] = dict(patches=side**2, batch=batch, network=name, width=width, parameters=count(network), gflop=total(book.ops)/1e9)
            def forward(network=network, given=given):
                with torch.no_grad(), arithmetic(o.precision, o.device): network(*given)
            def training(network=network, given=given, ours=ours):
                with plain_attention(ours), arithmetic(o.precision, o.device):
                    out = network(*given)
                    (out[0] if ours else out).float().square().mean().backward()
                network.zero_grad(set_to_none=True)
            tasks |= {(name, 'forward'): forward, (name, 'training'): training}
        for (name, what), seconds in take_turns(tasks, o.rounds, o.warmup, o.device).items():
            low, middle, high = (1e3*s/batch for s in quartiles(seconds))
            found[name][what] = dict(ms=middle, low=low, high=high, ratio=middle/found['FIT' if name in ('FIT', 'RIN') else 'FIT, local layers'].get(what, dict(ms=middle))['ms'])
        for row in found.values():
            rows.append(row)
            print(f"{row['patches']:6} patches  {row['network']:24} width {row['width']:4}{row['parameters']/1e6:7.2f}M{row['gflop']:8.2f} GFLOP" + ''.join(
                f"   {what} {row[what]['ms']:8.2f} ms ({row[what]['low']:.2f}-{row[what]['high']:.2f})  x{row[what]['ratio']:.2f}" for what in ('forward', 'training')), flush=True)
    told = provenance('python tests/bench_rin.py', o.device, precision=o.precision, batch=f'{o.batch} pictures of 256 patches, in proportion fewer of larger ones', rounds=o.rounds, warmup=o.warmup, ratio='time over that of the FIT of the pair', rate=rate, peer='RIN-pytorch 0.8.0')
    if o.json: o.json.write_text(json.dumps(dict(protocol=told, rows=rows), indent=1))


if __name__ == '__main__': main()

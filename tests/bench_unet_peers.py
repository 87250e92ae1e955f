"""How fast is the U-Net beside well-known ones of the same size? One run, one table; not part of the tests.

The peers have dependencies of their own, so give them an environment of their own:

    python -m venv peers
    peers/bin/pip install torch diffusers==0.42.0 video-diffusion-pytorch==0.7.0
    peers/bin/pip install -e .
    peers/bin/python tests/bench_unet_peers.py --size 85 --device cuda --precision bf16 --compile

Each peer is made as large as ours by the width of its channels (the printed size says how near it comes) and evaluates the same clip:
16 x 40 x 64 for 85 and 284 million parameters, which all of them can halve three times. Networks take turns, round after round, so that
whatever else the machine does falls on all alike; the table gives the median time of an evaluation, its quartiles, counted operations where
torch sees them, the rate at which they were done, and the ratio to ours. diffusers' network begins with a transformer along time at full
resolution that ours has no counterpart to; a row without it shows what it costs. `--backward` measures a training step's forward and backward
pass instead. Captions have 32 tokens of 768 channels; Unet3D pools text into one vector and reads none of it by attention."""
import argparse, json, sys, types
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from snapvideo_nb.blocks import Conditions
from snapvideo_nb.speed import arithmetic, matrix_rate, quartiles, take_turns
from snapvideo_nb.runs import provenance
from snapvideo_nb.unet import UNet, UNetConfig

SIZES = {'tiny': UNetConfig(frames=4, height=16, width=32, base=32, multipliers=(1, 2, 2, 3), attention=(16, 8, 4), head=32, condition_width=64, text_width=768, groups=8, dropout=0.),
         '85': UNetConfig(height=40, base=128, multipliers=(1, 2, 2, 3), text_width=768, dropout=0.),
         '284': UNetConfig(height=40, text_width=768, dropout=0.)}
count = lambda network: sum(p.numel() for p in network.parameters())


def ours(c: UNetConfig, batch: int, device):
    "Our network, and a function that evaluates it."
    network = UNet(c)
    told = Conditions(torch.randn(batch, 32, 768), torch.ones(batch, 32, dtype=torch.bool), torch.full((batch,), 24.), torch.full((batch, 2), 64.)).to(device)
    return network, lambda net, x, t: net(x, t, told)[0]


class Passed(torch.nn.Module):
    "A layer that does nothing, in the place of one of diffusers'."
    def forward(self, x, **options): return (x,)


def diffusers_unet(c: UNetConfig, batch: int, device, base: int, first: bool = True):
    "diffusers' UNet3DConditionModel with our multipliers; text of 768 channels. Without `first` its leading transformer along time is left out."
    from diffusers import UNet3DConditionModel
    widths = [base*m for m in c.multipliers]
    network = UNet3DConditionModel(in_channels=3, out_channels=3, block_out_channels=widths, layers_per_block=c.res_blocks, norm_num_groups=c.groups, cross_attention_dim=768,
                                   attention_head_dim=c.head, down_block_types=('DownBlock3D',) + ('CrossAttnDownBlock3D',)*3, up_block_types=('CrossAttnUpBlock3D',)*3 + ('UpBlock3D',))
    text = torch.randn(batch, 32, 768, device=device)
    if not first: network.transformer_in = Passed()
    return network, lambda net, x, t: net(x, t, text).sample


def lucidrains_unet(c: UNetConfig, batch: int, device, base: int):
    "video-diffusion-pytorch's Unet3D with our multipliers; a text vector of 768 channels. It imports torchvision for its data loading alone: empty modules stand in."
    for name in ('torchvision', 'torchvision.transforms', 'torchvision.utils'): sys.modules.setdefault(name, types.ModuleType(name))
    vars(sys.modules['torchvision']).update(transforms=sys.modules['torchvision.transforms'], utils=sys.modules['torchvision.utils'])
    sys.modules['torchvision.transforms'].ToTensor = lambda: None
    from video_diffusion_pytorch import Unet3D
    network = Unet3D(dim=base, dim_mults=c.multipliers, cond_dim=768, attn_dim_head=c.head, channels=3)
    text = torch.randn(batch, 768, device=device)
    return network, lambda net, x, t: net(x, t, cond=text)


def matched(make, c: UNetConfig, parameters: int, step: int) -> int:
    "The base width, a multiple of `step`, at which a peer's parameter count is nearest to ours."
    def distance(base):
        with torch.device('meta'): return abs(count(make(c, 1, 'meta', base)[0]) - parameters)
    best = step
    for base in range(step, 4*c.base + 1, step):
        if (d := distance(base)) <= distance(best): best = base
        elif d > parameters: break
    return best


def operations(network, call, c: UNetConfig) -> float | None:
    "Counted floating-point operations for one clip; None where a network cannot be counted without being run."
    try:
        with torch.device('meta'), FlopCounterMode(display=False) as counter: call(network, torch.empty(1, 3, c.frames, c.height, c.width), torch.ones(1))
        return float(counter.get_total_flops())
    except Exception: return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', choices=SIZES, default='tiny'); parser.add_argument('--device', default='cpu')
    parser.add_argument('--precision', choices=('fp32', 'tf32', 'bf16'), default='bf16'); parser.add_argument('--compile', action='store_true')
    parser.add_argument('--batch', type=int, default=1); parser.add_argument('--rounds', type=int, default=10); parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--backward', action='store_true'); parser.add_argument('--json', type=Path, help='write the result here')
    o = parser.parse_args()
    c = SIZES[o.size]
    with torch.device('meta'): size = count(UNet(c))
    makers = {'snapvideo_nb UNet': lambda c, batch, device, base: ours(c, batch, device), 'diffusers UNet3DConditionModel': diffusers_unet,
              '  without its first transformer': partial(diffusers_unet, first=False), 'video-diffusion-pytorch Unet3D': lucidrains_unet}
    x, t = torch.randn(o.batch, 3, c.frames, c.height, c.width, device=o.device), torch.zeros(o.batch, device=o.device)
    tasks, rows, rate = {}, {}, matrix_rate(o.precision, o.device)
    for name, make in makers.items():
        base = c.base if name.startswith('snapvideo') else rows['diffusers UNet3DConditionModel']['base'] if name.startswith(' ') else matched(make, c, size, c.groups)
        with torch.device('meta'): network, call = make(c, 1, 'meta', base)
        flop = operations(network, call, c)
        rows[name] = dict(base=base, parameters=count(network), gflop=flop and flop/1e9)
        torch.manual_seed(0)
        network, call = make(c, o.batch, o.device, base)
        network = network.to(o.device).train(o.backward)
        if o.compile: network.compile(dynamic=False)
        def task(network=network, call=call):
            with torch.set_grad_enabled(o.backward), arithmetic(o.precision, o.device):
                out = call(network, x, t)
                if o.backward:
                    with torch.autocast(torch.device(o.device).type, enabled=False): out.float().square().mean().backward()
            network.zero_grad(set_to_none=True)
        tasks[name] = task
    print(f'{"":32}{"base":>6}{"M":>8}{"GFLOP":>9}{"ms/clip":>11}{"quartiles":>20}{"GFLOP/s":>9}{"ratio":>7}')
    for name, seconds in take_turns(tasks, o.rounds, o.warmup, o.device).items():
        row = rows[name]
        low, middle, high = (1e3*s/o.batch for s in quartiles(seconds))
        row |= dict(ms=middle, low=low, high=high, ratio=middle/rows['snapvideo_nb UNet'].get('ms', middle), gflop_per_second=row['gflop'] and row['gflop']/middle*1e3*(3 if o.backward else 1))
        known = lambda value: f'{value:9.1f}' if value else f'{"?":>9}'
        print(f"{name:32}{row['base']:6}{row['parameters']/1e6:8.1f}{known(row['gflop'])}{middle:11.2f}{low:10.2f}{high:10.2f}{known(row['gflop_per_second'])}{row['ratio']:7.2f}")
    told = provenance('python tests/bench_unet_peers.py', o.device, size=o.size, clip=[c.frames, c.height, c.width], precision=o.precision, compile=o.compile, batch=o.batch, rounds=o.rounds, warmup=o.warmup,
                      what='forward and backward' if o.backward else 'evaluation', ratio='time over ours', rate=rate, peers='diffusers 0.42.0, video-diffusion-pytorch 0.7.0')
    print(f"{told['hardware']}, torch {told['torch']}, {o.precision}{', compiled' if o.compile else ''}, batch {o.batch}, {o.rounds} rounds in turns; the matrix rate is {rate/1e9:,.0f} GFLOP/s")
    if o.json: o.json.write_text(json.dumps(dict(protocol=told, rows=rows), indent=1))


if __name__ == '__main__': main()

"""How fast is the U-Net beside well-known ones of the same size? One run, one table; not part of the tests.

The peers have dependencies of their own, so give them an environment of their own:

    python -m venv peers
    peers/bin/pip install torch diffusers==0.42.0 video-diffusion-pytorch==0.7.0
    peers/bin/pip install -e .
    peers/bin/python tests/bench_unet_peers.py --size 85 --device cuda --precision bf16 --compile

Each peer is made as large as ours by the width of its channels (the printed size says how near it comes) and evaluates the same clip:
16 x 40 x 64 for 85 and 284 million parameters, which all of them can halve three times. Networks take turns, round after round, so that
whatever else the machine does falls on all alike; the table gives the median time of an evaluation, the spread between the quartiles, the
largest memory (CUDA), counted operations where torch sees them, and the ratio to ours. `--backward` measures a training step's forward and
backward pass instead. Captions have 32 tokens of 768 channels; Unet3D pools text into one vector and reads none of it by attention."""
import argparse, json, statistics, sys, time, types
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from snapvideo_nb.blocks import Conditions
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


def diffusers_unet(c: UNetConfig, batch: int, device, base: int):
    "diffusers' UNet3DConditionModel with our multipliers; text of 768 channels."
    from diffusers import UNet3DConditionModel
    widths = [base*m for m in c.multipliers]
    network = UNet3DConditionModel(in_channels=3, out_channels=3, block_out_channels=widths, layers_per_block=c.res_blocks, norm_num_groups=c.groups, cross_attention_dim=768,
                                   attention_head_dim=c.head, down_block_types=('DownBlock3D',) + ('CrossAttnDownBlock3D',)*3, up_block_types=('CrossAttnUpBlock3D',)*3 + ('UpBlock3D',))
    text = torch.randn(batch, 32, 768, device=device)
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


def operations(network, call, c: UNetConfig) -> float:
    "Counted floating-point operations for one clip."
    try:
        with torch.device('meta'), FlopCounterMode(display=False) as counter: call(network, torch.empty(1, 3, c.frames, c.height, c.width), torch.ones(1))
        return float(counter.get_total_flops())
    except Exception: return float('nan')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', choices=SIZES, default='tiny'); parser.add_argument('--device', default='cpu')
    parser.add_argument('--precision', choices=('fp32', 'tf32', 'bf16'), default='fp32'); parser.add_argument('--compile', action='store_true')
    parser.add_argument('--batch', type=int, default=1); parser.add_argument('--rounds', type=int, default=10); parser.add_argument('--warmup', type=int, default=3)
    parser.add_argument('--backward', action='store_true'); parser.add_argument('--only', nargs='*', help='peers by name'); parser.add_argument('--json', type=Path, help='write the result here')
    o = parser.parse_args()
    c, cuda = SIZES[o.size], o.device.startswith('cuda')
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = o.precision == 'tf32'
    torch.backends.cudnn.benchmark = True
    with torch.device('meta'): size = count(UNet(c))
    makers = {'snapvideo_nb UNet': lambda c, batch, device, base: ours(c, batch, device), 'diffusers UNet3DConditionModel': diffusers_unet, 'video-diffusion-pytorch Unet3D': lucidrains_unet}
    networks, rows = {}, {}
    for name, make in makers.items():
        if o.only is not None and name not in o.only and make is not makers['snapvideo_nb UNet']: continue
        base = c.base if name.startswith('snapvideo') else matched(make, c, size, c.groups)
        torch.manual_seed(0)
        with torch.device('meta'): network, call = make(c, 1, 'meta', base)
        rows[name] = dict(base=base, parameters=count(network), gflop=operations(network, call, c)/1e9, ms=[])
        network, call = make(c, o.batch, o.device, base)
        network = network.to(o.device).train(o.backward)
        networks[name] = (torch.compile(network) if o.compile else network), call
    x, t = torch.randn(o.batch, 3, c.frames, c.height, c.width, device=o.device), torch.zeros(o.batch, device=o.device)
    sync = torch.cuda.synchronize if cuda else lambda: None
    for round in range(-o.warmup, o.rounds):
        for name, (network, call) in networks.items():
            if cuda: torch.cuda.reset_peak_memory_stats()
            sync(); began = time.perf_counter()
            with nullcontext() if o.backward else torch.no_grad():
                with torch.autocast(o.device.split(':')[0], torch.bfloat16) if o.precision == 'bf16' else nullcontext(): out = call(network, x, t)
                if o.backward: out.float().square().mean().backward(); network.zero_grad(set_to_none=True)
            sync()
            if round >= 0: rows[name]['ms'].append(1e3*(time.perf_counter() - began)/o.batch)
            if cuda: rows[name]['GiB'] = torch.cuda.max_memory_allocated()/2**30
    first = statistics.median(next(iter(rows.values()))['ms'])
    print(f'{"":32}{"base":>6}{"M":>8}{"GFLOP":>9}{"ms/clip":>10}{"quartiles":>16}{"GiB":>7}{"ratio":>8}')
    for name, row in rows.items():
        low, middle, high = statistics.quantiles(row['ms'], n=4) if len(row['ms']) > 1 else row['ms']*3
        row |= dict(median=statistics.median(row['ms']), ratio=statistics.median(row['ms'])/first)
        print(f"{name:32}{row['base']:6}{row['parameters']/1e6:8.1f}{row['gflop']:9.1f}{row['median']:10.2f}{low:8.2f}{high:8.2f}{row.get('GiB', float('nan')):7.2f}{row['ratio']:8.2f}")
    where = torch.cuda.get_device_name() if cuda else f'{torch.get_num_threads()} CPU threads'
    protocol = dict(vars(o) | dict(json=None), device_name=where, torch=torch.__version__)
    print(f'ratio: time over ours; {where}, torch {torch.__version__}, {o.precision}{", compiled" if o.compile else ""}, batch {o.batch}, {o.rounds} rounds')
    if o.json: o.json.write_text(json.dumps(dict(protocol=protocol, rows=rows), indent=1))


if __name__ == '__main__': main()

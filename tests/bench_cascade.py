"""What an upsampler adds to clips and how much noise it should be told of: one command, three records; not part of the tests.

    python tests/bench_cascade.py                           # all of it with `mini` and `mini-up`: about ten minutes of one thread, and it may be cut at any time
    python tests/bench_cascade.py --model mini --up FOLDER  # another upsampler; its captions, clips and seeds stay the same

* `truth.json`: small versions of 32 real clips, enlarged: by bicubic interpolation, and by the upsampler at levels 0 to 0.25. Beside what `looks` tells: peak signal-to-noise ratio of the frames and of their changes, against the real clip.
* `levels.json`: 32 clips of the first stage, enlarged at levels 0 to 0.25 with 8 steps of DPM-Solver++, the default; and at the best of these levels (the lowest whose kernel distance to what the data set draws is within 2 % of the smallest) in other ways.
* `stages.json`: 64 other clips of the first stage, enlarged by bicubic interpolation and by the upsampler at that level, beside the same programs drawn by the data set.

Captions are programs 0, 1, ... of the held-out split of Emoji with seed 7 (truth, stages) or 11 (levels: what chooses the level has no part in the comparison); seeds are 1000, 1001, ...
Every row is written when it is done; the same command continues, and skips what is there. A record of other weights or settings is refused: `--force` begins it again."""
import argparse, sys
from functools import cached_property
from pathlib import Path

import torch
from bench_sampling import RESULTS, Record
from torch import nn
from torch.nn import functional as F
from snapvideo_nb.cascade import Cascade, upsample
from snapvideo_nb.data import Emoji
from snapvideo_nb.metrics import CaptionJudge
from snapvideo_nb.model import weights_folder
from snapvideo_nb.runs import digest
from snapvideo_nb.sampling import sample
from snapvideo_nb.upsampling import enlarge, shrink
from snapvideo_nb.video import to_tensor

LEVELS = (0., .03, .06, .1, .15, .25)
WAYS = {'4 steps': dict(steps=4), '16 steps': dict(steps=16), '8 steps of Heun': dict(solver='heun'), 'down to a 500th of the spread': dict(lowest=.002)}


def psnr(video, truth):
    "Peak signal-to-noise ratio in dB of clips in [-1, 1] against the true ones, the mean over clips."
    return (10*(4/(video - truth).square().flatten(1).mean(1)).log10()).mean().item()


def kernel_distance(x, y):
    "Maximum mean discrepancy, squared, of two sets of features of unit length, [n, d] each, under the kernel (x.y + 1)^3: 0 for the same set."
    return sum(sign*((a @ b.T + 1)**3).mean() for sign, a, b in ((1, x, x), (1, y, y), (-2, x, y))).item()


class Bench:
    "The three parts for one cascade, each returning its rows."
    def __init__(self, name: str = 'mini', up: str = 'mini-up', folder: Path = RESULTS/'cascade', force: bool = False, micro_batch: int = 4, say=print):
        self.cascade, self.folder, self.force, self.micro_batch, self.say = Cascade.from_pretrained(name, up), Path(folder), force, micro_batch, say
        self.size = self.cascade.up.shape[2:]
        self.settings = dict(model=Path(name).name, up=Path(up).name, micro_batch=micro_batch, solver='heun', guidance=1, up_solver='dpm++', up_guidance=0, seeds='1000 and up', programs='0 and up')
        self.settings |= {key: digest(weights_folder(n)/'model.safetensors')[:16] for key, n in (('weights', name), ('up_weights', up))}

    def record(self, part: str, seed: int, **settings):
        return Record(self.folder/f'{part}.json', self.force, 'python tests/bench_cascade.py', captions=f'Emoji(16, 36, 64, subjects=16, split="held_out", seed={seed})', **self.settings, **settings)

    def asked(self, seed: int, clips: int):
        "Programs, and the clips that the data set draws for them, large."
        data = Emoji(16, *self.size, subjects=16, split='held_out', seed=seed)
        return [data.program(j) for j in range(clips)], torch.stack([to_tensor(data.clip(j).frames) for j in range(clips)])

    @cached_property
    def judge(self): return CaptionJudge(height=self.size[0], width=self.size[1], folder=RESULTS/'metrics')

    def features(self, video):
        "128 features, of unit length together, of four frames of each clip, from the judge's network that names subjects in colour."
        network, frames = nn.Sequential(*list(self.judge.subject)[:-1]), video[:, :, 1::4].transpose(1, 2).flatten(0, 1)
        with torch.no_grad(): return F.normalize(torch.cat([network(part) for part in frames.split(64)]), dim=1)

    def looks(self, video, truths, real, small=None, paired=False) -> dict:
        """`distance`: kernel distance between features of the clips and of `real`, what the data set draws for the same programs; `edges`: mean difference between neighbouring pixels of a frame, `change`: of a pixel from frame to frame, both in [-1, 1];
        `kept`: rms between the clip, shrunk, and the small clip; `psnr`, `psnr_change`: of frames and of their changes, in dB, when `real` is what ought to come out (`paired`); `judged`: right answers of the caption judge."""
        found = dict(distance=kernel_distance(self.features(video), self.features(real)), change=video.diff(dim=2).abs().mean().item(),
                     edges=((video.diff(dim=3).abs().mean() + video.diff(dim=4).abs().mean())/2).item())
        if small is not None: found |= dict(kept=(shrink(video, *small.shape[3:]) - small).square().mean().sqrt().item())
        if paired: found |= dict(psnr=psnr(video, real), psnr_change=psnr(video.diff(dim=2), real.diff(dim=2)))
        judged = self.judge.accuracy(video, truths)
        return {key: round(value, 5) for key, value in found.items()} | dict(judged={key: [judged[key]['right'], judged[key]['count']] for key in ('background', 'subject', 'shape', 'motion', 'speed')})

    def enlarged(self, programs, small, level, steps=8, solver='dpm++', lowest=.1):
        up = self.cascade.up
        return upsample(up, [p['caption'] for p in programs], small, list(range(1000, 1000 + len(small))), steps, level, solver=solver, sigma_min=lowest*up.config.spread(level), micro_batch=self.micro_batch)

    def first(self, programs): return sample(self.cascade.base, [p['caption'] for p in programs], list(range(1000, 1000 + len(programs))), 16, 1., micro_batch=self.micro_batch)

    def truth(self, clips: int = 32) -> dict:
        record, (programs, large) = self.record('truth', 7, clips=clips, steps=8), self.asked(7, clips)
        small = shrink(large, *self.cascade.base.shape[2:])
        record.row('drawn by the data set', lambda: self.looks(large, programs, large, small), self.say)
        record.row('bicubic', lambda: self.looks(enlarge(small, *self.size), programs, large, small, True), self.say)
        for level in LEVELS: record.row(f'level {level:g}', lambda: dict(level=level) | self.looks(self.enlarged(programs, small, level), programs, large, small, True), self.say)
        return record.told['rows']

    def levels(self, clips: int = 32) -> dict:
        record, (programs, large) = self.record('levels', 11, clips=clips, first_steps=16), self.asked(11, clips)
        small = self.first(programs)
        record.row('bicubic', lambda: self.looks(enlarge(small, *self.size), programs, large, small), self.say)
        for level in LEVELS: record.row(f'level {level:g}', lambda: dict(level=level, steps=8) | self.looks(self.enlarged(programs, small, level), programs, large, small), self.say)
        for name, way in WAYS.items(): record.row(name, lambda: dict(level=self.best) | way | self.looks(self.enlarged(programs, small, self.best, **way), programs, large, small), self.say)
        return record.told['rows']

    @property
    def best(self) -> float:
        "Of the levels in levels.json whose kernel distance is within 2 % of the smallest the lowest: noise that buys nothing only costs what the small clip says."
        rows = [row for name, row in Record(self.folder/'levels.json').told['rows'].items() if name.startswith('level')]
        return min(row['level'] for row in rows if row['distance'] <= 1.02*min(row['distance'] for row in rows))

    def stages(self, clips: int = 64) -> dict:
        record, (programs, large) = self.record('stages', 7, clips=clips, first_steps=16, steps=8, level=self.best), self.asked(7, clips)
        small = self.first(programs)
        record.row('drawn by the data set', lambda: self.looks(large, programs, large), self.say)
        record.row('bicubic', lambda: self.looks(enlarge(small, *self.size), programs, large, small), self.say)
        record.row('upsampler', lambda: self.looks(self.enlarged(programs, small, self.best), programs, large, small), self.say)
        return record.told['rows']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='mini', help='the first stage: a shipped model or a folder (default: mini)')
    parser.add_argument('--up', default='mini-up', help='its upsampler (default: mini-up)')
    parser.add_argument('--parts', nargs='+', choices=('truth', 'levels', 'stages'), default=('truth', 'levels', 'stages'), help='which to measure (default: all)')
    parser.add_argument('--folder', type=Path, default=RESULTS/'cascade', help='where the records lie (default: data/results/cascade)')
    parser.add_argument('--threads', type=int, default=1, help='threads of torch (default: 1)')
    parser.add_argument('--force', action='store_true', help='measure again what is there')
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    try:
        bench = Bench(o.model, o.up, o.folder, o.force, say=lambda line: print(line, flush=True))
        for part in o.parts: getattr(bench, part)()
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__': main()

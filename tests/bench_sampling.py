"""What solvers, guidance and carried latents do to a trained model, and what the sampler costs beside its network: one command, three records; not part of the tests.

    python tests/bench_sampling.py                                    # all of it with `mini`: about half an hour of one thread, and it may be cut at any time
    python tests/bench_sampling.py --parts overhead --model FOLDER    # one part, for another model of clips 16x18x32

* `solvers.json`: 4 clips, unguided. The distance (root mean square over all values of a clip in [-1, 1]) from the clip that 512 Heun steps make of the same seed, for euler, heun and dpm++ on two grids
  (rho = 7, and even in log sigma) at 7 to 127 evaluations each; for heun without the latents of the evaluation before; and for heun and dpm++ without latents from a reference without latents.
* `guidance.json`: 32 clips of 16 Heun steps for each setting of `Guidance`: what the caption judge reads off them, how much moves, how strong the colours are. The first row is the same programs drawn by the data set.
* `overhead.json`: processor time of `sample`, text encoding and all, over that of the model's evaluations inside it (`own`), and over that of bare calls of the model with the same arguments, made in turns with them (`ratio`).

Captions are programs 0, 1, ... of the held-out split of Emoji with seed 7, seeds are 1000, 1001, ... Every row is written when it is done; the same command continues, and skips what is there. A record of other
weights or of other settings is refused: `--force` begins it again."""
import argparse, json, math, statistics, sys, time
from functools import cached_property
from pathlib import Path

import torch
from snapvideo_nb.data import Emoji
from snapvideo_nb.guidance import Guidance
from snapvideo_nb.metrics import CaptionJudge, track
from snapvideo_nb.model import SnapVideo, weights_folder
from snapvideo_nb.runs import digest, provenance, write_text
from snapvideo_nb.sampling import sample
from snapvideo_nb.video import to_tensor

RESULTS = Path(__file__).resolve().parent.parent/'data'/'results'
CAPTIONS = 'Emoji(subjects=16, split="held_out", seed=7)'
SETTINGS = {f'w = {w:g}': Guidance(w) for w in (0., 1., 2., 4., 8.)} | {
    'w = 8, thresholded': Guidance(8., threshold=.995), 'w = 8, oscillating': Guidance(8., oscillate=0., steady=4), 'w = 8, interval': Guidance(8., interval=(.1, 2.))}


def withheld(denoiser):
    "The denoiser, but each evaluation begins without latents."
    return lambda x, sigma, state: (denoiser(x, sigma, state._replace(latents=None))[0], None)


class Timed:
    "A model that makes every evaluation twice, the second time (or the first, in turns) only to be timed: processor seconds of both."
    def __init__(self, model): self.inner, self.own, self.bare, self.turn = model, 0., 0., False
    def __getattr__(self, name): return getattr(self.inner, name)
    def eval(self): return self

    def timed(self, *args):
        began = time.process_time()
        return self.inner(*args), time.process_time() - began

    def __call__(self, *args):
        self.turn = not self.turn
        if self.turn: (_, bare), (found, own) = self.timed(*args), self.timed(*args)
        else: (found, own), (_, bare) = self.timed(*args), self.timed(*args)
        self.own, self.bare = self.own + own, self.bare + bare
        return found


class Record:
    "A JSON file of a protocol and rows by name, written after each row. ValueError when it holds rows of other weights or settings."
    def __init__(self, path: Path, force: bool = False, command: str = 'python tests/bench_sampling.py', **settings):
        self.path, self.told = path, dict(protocol=provenance(command, **settings), rows={})
        if path.exists() and not force:
            kept = json.loads(path.read_text('utf-8'))
            if wrong := [key for key, value in json.loads(json.dumps(settings)).items() if kept['protocol'].get(key) != value]:
                raise ValueError(f'{path}: measured with another {wrong[0]}; --force measures it again')
            self.told = kept

    def row(self, name: str, make, say=print):
        "The row of a name: the kept one, or what `make()` returns, with the processor time that it took."
        if name not in (rows := self.told['rows']):
            began = time.process_time()
            rows[name] = make()
            rows[name]['seconds'] = round(time.process_time() - began, 2)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(self.told, indent=1))
            say(f'{self.path.stem}: {name}: {json.dumps({k: v for k, v in rows[name].items() if not isinstance(v, (dict, list))})}')
        return rows[name]


class Bench:
    "The three parts for one model: `solvers(...)`, `guidance(...)`, `overhead(...)`, each returning its rows."
    def __init__(self, name: str = 'mini', folder: Path = RESULTS/'sampling', force: bool = False, micro_batch: int = 4, say=print):
        self.model, self.folder, self.force, self.micro_batch, self.say = SnapVideo.from_pretrained(name), Path(folder), force, micro_batch, say
        self.settings = dict(model=Path(name).name, weights=digest(weights_folder(name)/'model.safetensors')[:16], captions=CAPTIONS, programs='0 and up', seeds='1000 and up', micro_batch=micro_batch)

    @cached_property
    def held(self): return Emoji(subjects=16, split='held_out', seed=7)

    def sample(self, clips: int, **options):
        "The first `clips` captions, and how many evaluations they took."
        count, around = [0], options.pop('around', lambda denoiser: denoiser)
        def counted(denoiser):
            inner = around(denoiser)
            def answer(*args):
                count[0] += 1
                return inner(*args)
            return answer
        return sample(self.model, [self.held.program(j)['caption'] for j in range(clips)], list(range(1000, 1000 + clips)), micro_batch=self.micro_batch, around=counted, **options), count[0]

    def record(self, part: str, **settings): return Record(self.folder/f'{part}.json', self.force, **self.settings, **settings)

    def solvers(self, clips: int = 4, steps: int = 512, budgets=(4, 8, 16, 32, 64)) -> dict:
        "Distance from the reference over evaluations; `budgets` are Heun steps N, the one-evaluation solvers take 2N - 1."
        record, references = self.record('solvers', clips=clips, reference=f'{steps} steps of heun, rho = 7', guidance=0), {}
        def apart(n, reference='carried', **options):
            if reference not in references: references[reference] = self.sample(clips, steps=steps, **dict(around=withheld) if reference == 'withheld' else {})[0]
            video, evaluations = self.sample(clips, steps=n, **options)
            each = (video - references[reference]).square().flatten(1).mean(1).sqrt()
            return dict(steps=n, evaluations=evaluations, rms=round(each.mean().item(), 6), each=[round(e, 6) for e in each.tolist()])
        for n in budgets:
            for grid, rho in (('rho 7', 7.), ('log', math.inf)):
                for solver in ('euler', 'heun', 'dpm++'):
                    steps_of = n if solver == 'heun' else 2*n - 1
                    record.row(f'{solver}, {grid}, {2*n - 1}', lambda: dict(solver=solver, grid=grid, latents='carried') | apart(steps_of, solver=solver, rho=rho), self.say)
            record.row(f'heun, rho 7, withheld, {2*n - 1}', lambda: dict(solver='heun', grid='rho 7', latents='withheld') | apart(n, around=withheld), self.say)
            for solver, steps_of in (('heun', n), ('dpm++', 2*n - 1)):
                record.row(f'{solver}, rho 7, withheld in both, {2*n - 1}', lambda: dict(solver=solver, grid='rho 7', latents='withheld in both') | apart(steps_of, 'withheld', solver=solver, around=withheld), self.say)
        return record.told['rows']

    @cached_property
    def judge(self): return CaptionJudge(folder=RESULTS/'metrics')

    def looks(self, video, truths) -> dict:
        """What the judge reads; `motion`: mean change from frame to frame of a value in [-1, 1]; `path`: frame widths that the subject's centre moves per frame; `chroma`: largest less smallest
        colour of a pixel, in [0, 1]; `limit`: share of values at black or white."""
        x, y, _ = track(video).unbind(1)
        path = ((x.diff(dim=1))**2 + (y.diff(dim=1)*video.shape[-2]/video.shape[-1])**2).sqrt()
        measured = dict(motion=video.diff(dim=2).abs().mean(), path=path.mean(), chroma=(video.amax(1) - video.amin(1)).mean()/2, limit=(video.abs() > .99).float().mean())
        return {key: round(value.item(), 5) for key, value in measured.items()} | dict(judged={k: v for k, v in self.judge.accuracy(video, truths).items() if k not in ('rows', 'protocol', 'held_out')})

    def guidance(self, clips: int = 32, steps: int = 16, settings: dict = SETTINGS) -> dict:
        "Accuracy, motion and colours for settings of `Guidance`."
        record, truths = self.record('guidance', clips=clips, steps=steps, solver='heun'), [self.held.program(j) for j in range(clips)]
        record.row('drawn by the data set', lambda: self.looks(torch.stack([to_tensor(self.held.clip(j).frames) for j in range(clips)]), truths), self.say)
        def made(guidance, **options):
            branches = []
            def passes(denoiser):
                return lambda x, sigma, state: (branches.append(1 + bool(guidance.at(state.step, sigma))), denoiser(x, sigma, state))[1]
            around = options.pop('around', lambda denoiser: denoiser)
            video, _ = self.sample(clips, steps=steps, guidance=guidance, around=lambda denoiser: around(passes(denoiser)), **options)
            return dict(setting=str(guidance), passes=sum(branches)) | self.looks(video, truths)
        for name, guidance in settings.items(): record.row(name, lambda: made(guidance), self.say)
        record.row('w = 1, latents withheld', lambda: made(Guidance(1.), around=withheld), self.say)
        return record.told['rows']

    def overhead(self, clips: int = 4, steps: int = 8, rounds: int = 5) -> dict:
        "Time of `sample` over that of its evaluations, and over that of bare calls with the same arguments."
        record = self.record('overhead', clips=clips, steps=steps, solver='heun', rounds=rounds, clock='processor time, medians over the rounds')
        captions = [self.held.program(j)['caption'] for j in range(clips)]
        def run(weight, micro_batch):
            model, began = Timed(self.model), time.process_time()
            sample(model, captions, steps=steps, guidance=weight, micro_batch=micro_batch)
            whole = time.process_time() - began - model.bare
            return dict(own=whole/model.own, ratio=whole/model.bare, bare_ms=1000*model.bare/(2*steps - 1)/clips)
        def measured(weight, micro_batch):
            runs = [run(weight, micro_batch) for _ in range(rounds + 1)][1:]
            return {key: round(statistics.median(r[key] for r in runs), 4) for key in runs[0]} | {f'{key}s': [round(r[key], 4) for r in runs] for key in ('own', 'ratio')}
        for weight in (0., 1.):
            for micro_batch in (1, 4): record.row(f'w = {weight:g}, micro-batch of {micro_batch}', lambda: dict(weight=weight, micro_batch=micro_batch) | measured(weight, micro_batch), self.say)
        return record.told['rows']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='mini', help='a shipped model or a folder (default: mini)')
    parser.add_argument('--parts', nargs='+', choices=('guidance', 'solvers', 'overhead'), default=('guidance', 'solvers', 'overhead'), help='which to measure (default: all)')
    parser.add_argument('--folder', type=Path, default=RESULTS/'sampling', help='where the records lie (default: data/results/sampling)')
    parser.add_argument('--threads', type=int, default=1, help='threads of torch (default: 1)')
    parser.add_argument('--force', action='store_true', help='measure again what is there')
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    try:
        bench = Bench(o.model, o.folder, o.force, say=lambda line: print(line, flush=True))
        for part in o.parts: getattr(bench, part)()
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__': main()

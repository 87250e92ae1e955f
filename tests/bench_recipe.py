"""What makes `mini` learn on two cores: trials of equal processor time, each from nothing, each a few settings away from another; not part of the tests.

    python tests/bench_recipe.py                      # all trials that have no record yet, eight minutes of one thread each; may be cut between trials
    python tests/bench_recipe.py patch34 lamb         # these
    python tests/bench_recipe.py --model runs/x/model # the same figures for a finished model: shipped.json for mini, else NAME.json by its run
    python tests/bench_recipe.py --returning          # motions that return, by guidance and solver
    python tests/bench_recipe.py --profile            # where the time of a training step goes
    python tests/bench_recipe.py --reading            # how much of a caption reaches the picture, by how the captions are read; some ten minutes of one thread
    python tests/bench_recipe.py --lesson             # mini's recipe from nothing, with a first lesson in front of black and without; some half an hour of one thread

A trial measures its own seconds per step, takes as many steps as fit into the budget (the learning rate falls to its end within them), and leaves data/results/recipe/NAME.json: settings, steps, the training loss by noise level, and the
error of its averaged weights on 64 held-out clips (mean square over all values of a clip in [-1, 1]) at nine effective noise levels sigma*sigma_in, for the right caption, for one with another motion, and for none; and what the caption
judge reads off 32 samples.

Training clips: Emoji(subjects=16, images=.1), seed 0. Held-out clips: Emoji(subjects=16, split="held_out", seed=7), numbers 0 to 63, noise of seed 5. Samples: captions 0 to 31 of these, seeds 1000 and up, 16 Heun steps, guidance 1. For a finished model also `fixed`: the 64 captions, seeds and settings of notebook 13."""
import argparse, json, os, sys, tempfile, time
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from snapvideo_nb.blocks import plain_attention
from snapvideo_nb.data import Emoji, describe
from snapvideo_nb.metrics import CaptionJudge
from snapvideo_nb.model import PRESETS, SnapVideo, weights_folder
from snapvideo_nb.runs import provenance, write_text
from snapvideo_nb.sampling import sample
from snapvideo_nb.training import Alone, TrainConfig, Trainer, TrainingClips, loss_by_noise, open_clips, recipe, take_step
from snapvideo_nb.video import collate, to_tensor

RESULTS = Path(__file__).resolve().parent.parent/'data'/'results'
LEVELS = (.25, .5, 1, 2, 4, 8, 16, 32, 64)
OTHER = {'left': 'right', 'right': 'left', 'up': 'down', 'down': 'up', 'up left': 'down right', 'up right': 'down left', 'down left': 'up right', 'down right': 'up left',
         'bounce': 'zoom in', 'orbit': 'zoom out', 'zoom in': 'zoom out', 'zoom out': 'zoom in', 'shake': 'bounce', 'still': 'orbit'}

FIRST = dict(net=dict(patch=(1, 6, 4), group=(16, 3, 8), patch_width=192), train=dict(lr=2e-3, P_mean=-.5, P_std=1.2, self_conditioning=.3))
NOISE = dict(P_mean=1., P_std=1.5)
PLAIN = dict(net=dict(finish=16), train=NOISE | dict(self_conditioning=0.))
LAST = dict(net=dict(patch=(1, 3, 4), patch_width=128, finish=16), train=dict(lr=1.5e-3, P_mean=.7, P_std=1.5, self_conditioning=.1, data_options=dict(subjects=16, images=.1, stride=(1, 1, 2))))
def after(base, **change): return {key: base.get(key, {}) | change.get(key, {}) for key in ('net', 'train')}
def net(**sizes): return after(PLAIN, net=sizes)
def train(**settings): return after(LAST, train=settings)

TRIALS = dict(
    first={}, noise_half=dict(train=dict(P_mean=.5)), noise_1=dict(train=NOISE), noise_2=dict(train=dict(P_mean=2., P_std=1.8)), no_latents=dict(train=NOISE | dict(self_conditioning=0.)), rate_4=dict(train=NOISE | dict(lr=4e-3)),
    finish=dict(net=dict(finish=16), train=NOISE), plain=PLAIN, rate_1=after(PLAIN, train=dict(lr=1e-3)), batch_8=after(PLAIN, train=dict(batch=8)),
    local_2=net(local_layers=2), blocks_4=net(blocks=4), latents_192=net(latent_width=192), width_256=net(patch_width=256), heads_32=net(patch_head=32, latent_head=32), patch_time=net(patch=(2, 6, 4), group=(8, 3, 8)),
    patch_34=net(patch=(1, 3, 4), patch_width=128), last=LAST,
    last_again=train(seed=1), paper_weight=train(weight='paper'), lamb=train(optimizer='lamb', lr=1e-2), captions_kept=train(label_dropout=0.), average_short=train(ema_ramp=.01), all_subjects=train(data_options=dict(images=.1, stride=(1, 1, 2))))


def settings(name: str, run) -> tuple:
    "The model's configuration and the training run of a trial."
    change = TRIALS[name]
    preset = PRESETS['mini']
    model = replace(preset, network=replace(preset.network, **dict(finish=0) | FIRST['net'] | change.get('net', {})))
    told = dict(data_options=dict(subjects=16, images=.1), warmup=200, weight='unit', fused_attention=False, workers=1, sample_every=0, checkpoint_every=10**9)
    return model, TrainConfig(run=str(run), preset='mini', **told | FIRST['train'] | change.get('train', {}))


@cache
def held():
    "Held-out clips, their captions, and captions with another motion."
    world = Emoji(subjects=16, split='held_out', seed=7)
    clips = [world[i] for i in range(64)]
    other = [describe(dict(c.truth, motion=OTHER[c.truth['motion']], speed=c.truth['speed'] or 'quickly')) for c in clips]
    return world, torch.stack([to_tensor(c.frames) for c in clips]), [c.caption for c in clips], other


@torch.no_grad()
def errors(model, levels=LEVELS) -> dict:
    "Mean square error on the held-out clips at each effective noise level, with the caption, with a wrong motion, without a caption."
    _, video, captions, other = held()
    noise, found = torch.randn(video.shape, generator=torch.Generator().manual_seed(5)), {}
    asked = dict(said=model.conditions(captions), swapped=model.conditions(other), none=model.conditions(captions).without_text())
    for level in levels:
        sigma = torch.full((len(video),), level/model.framework.sigma_in)
        x = model.framework.diffuse(video, noise, sigma)
        def error(told): return (torch.cat([model(x[i:i + 16], sigma[i:i + 16], told[i:i + 16])[0] for i in range(0, len(video), 16)]) - video).square().mean().item()
        found[level] = {kind: round(error(told), 5) for kind, told in asked.items()}
    return found


def judged(model, world=None, count: int = 32, first: int = 1000, steps: int = 16) -> dict:
    "What the judge finds right in samples of a held-out world's first captions, seeds `first` and up."
    programs = [(world or held()[0]).program(i) for i in range(count)]
    video = sample(model, [p['caption'] for p in programs], list(range(first, first + count)), steps, 1., micro_batch=4)
    found = CaptionJudge(folder=RESULTS/'metrics').accuracy(video, programs)
    return {key: [found[key]['right'], found[key]['count']] for key in ('background', 'subject', 'shape', 'motion', 'speed')}


RETURNING = dict(guidance_1=(1., 'dpm++', 24), guidance_2=(2., 'dpm++', 24), guidance_0=(0., 'dpm++', 24), churn=(1., 'churn', 32))

def returning(path: Path, name: str = 'mini'):
    "Samples of 48 held-out captions whose motion comes back or changes size, by guidance and solver: what the judge finds right."
    world, model = Emoji(subjects=16, split='held_out', seed=2), SnapVideo.from_pretrained(name).eval()
    programs = [p for p in map(world.program, range(400)) if p['motion'] in ('shake', 'bounce', 'zoom out', 'orbit')][:48]
    judge, found = CaptionJudge(folder=RESULTS/'metrics'), {}
    for key, (guidance, solver, steps) in RETURNING.items():
        video = sample(model, [p['caption'] for p in programs], list(range(100, 148)), steps, guidance, solver=solver, micro_batch=8)
        said = judge.accuracy(video, programs)
        found[key] = dict(guidance=guidance, solver=solver, steps=steps, right={what: [said[what]['right'], said[what]['count']] for what in ('motion', 'shape', 'subject')})
        print(key, found[key]['right'], flush=True)
    write_text(path, json.dumps(dict(protocol=provenance('python tests/bench_recipe.py --returning', captions="the first 48 of Emoji(subjects=16, split='held_out', seed=2) with a shake, bounce, zoom out or orbit", seeds='100 to 147'), found=found), indent=1))


def steps_of(config: TrainConfig, steps: int, watch, whole: bool = False):
    "Train from nothing for so many steps, in which the learning rate falls to its end (`whole`: as in the whole run); `watch(trainer)` after each. Returns the trainer."
    clips, team = open_clips(config), Alone('cpu')
    trainer, source = Trainer(config if whole else replace(config, steps=steps), clips, team), TrainingClips(clips, config.seed)
    with plain_attention(not config.fused_attention):
        for batch, _ in source.portions(team.rows(config.batch), range(steps), config.batch, 1):
            take_step(trainer, batch)
            watch(trainer)
    return trainer


def trial(name: str, seconds: float) -> dict:
    "One trial: its record."
    with tempfile.TemporaryDirectory() as folder:
        model, config = settings(name, Path(folder)/'run')
        Path(config.run).mkdir()
        kept, PRESETS['mini'] = PRESETS['mini'], model
        try:
            ends, curve = [], []
            steps_of(config, 14, lambda trainer: ends.append(time.process_time()))
            per_step = median(b - a for a, b in zip(ends[3:], ends[4:]))
            began = time.process_time()
            def watch(trainer):
                p = trainer.progress
                if p.step % 100 and p.step != steps: return
                curve.append(dict(step=p.step, cpu_seconds=round(time.process_time() - began), loss=round(sum(p.losses)/len(p.losses), 5), by_noise=loss_by_noise(torch.tensor(p.losses), torch.tensor(p.sigmas))))
                p.losses, p.sigmas = [], []
            steps = max(20, int(seconds/per_step))
            trainer = steps_of(config, steps, watch)
        finally: PRESETS['mini'] = kept
    average = trainer.average.eval()
    return dict(protocol=provenance(f'python tests/bench_recipe.py {name}', budget=seconds), change=TRIALS[name], steps=steps, clips=steps*config.batch, cpu_seconds=round(time.process_time() - began), per_step=round(per_step, 4),
                parameters=sum(p.numel() for p in average.parameters()), curve=curve, errors=errors(average), judged=judged(average))


def finished(name: str) -> dict:
    "The figures of a trial for a model that is there, with the log of its run."
    model, log = SnapVideo.from_pretrained(name).eval(), weights_folder(name).parent/'log.jsonl'
    rows = [json.loads(line) for line in log.read_text('utf-8').splitlines()] if log.exists() else []
    return dict(protocol=provenance(f'python tests/bench_recipe.py --model {name}'), config={key: value for key, value in json.loads((log.parent/'config.json').read_text('utf-8')).items() if key not in ('run', 'init_from')} if rows else {}, log=[{key: row[key] for key in ('step', 'clips', 'seconds', 'loss', 'by_noise')} for row in rows],
                parameters=sum(p.numel() for p in model.parameters()), errors=errors(model), judged=judged(model), fixed=judged(model, Emoji(subjects=16, split='held_out', seed=0), 64, 0, 32))


READING = dict(scratch='encoder from nothing, trained along', taught='encoder taught to read (500 steps), then frozen', bare='encoder from nothing, captions of five words in fixed places')

class Bare(Emoji):
    "Emoji whose captions are five words: subject, motion, speed and the two ends of the background, each word at home in one place."
    def program(self, j, **fixed):
        p = super().program(j, **fixed)
        return p | dict(caption=' '.join([p['subject'].replace(' ', ''), (p['motion'] or 'none').replace(' ', ''), p['speed'] or 'none', f'{p["colours"][0]}a', f'{p["colours"][-1]}b']))

def read_trial(kind: str, steps: int = 150, every: int = 75) -> dict:
    "A small FIT at high noise only, where a clip is what its caption says: its error on held-out clips, by how it reads."
    size, world = dict(frames=4, stride=4), Bare if kind == 'bare' else Emoji
    sizes = replace(PRESETS['mini'].network, frames=4, patch=(1, 6, 8), group=(4, 3, 4), latents=48, latent_width=192, blocks=2, finish=0)
    config = TrainConfig(run='', preset='mini', steps=10_000, batch=64, optimizer='muon', lr=6e-3, warmup=100, P_mean=3.2, P_std=.8, weight='unit', self_conditioning=0., fused_attention=False,
                         frozen_text=kind == 'taught', reading=500*(kind == 'taught'), data_options=dict(subjects=16, stride=4))
    kept, PRESETS['mini'], curve = PRESETS['mini'], replace(PRESETS['mini'], network=sizes), {}
    try:
        clips, held = world(subjects=16, **size), world(subjects=16, split='held_out', seed=7, **size)
        asked = collate([held[i] for i in range(64)])
        noise, trainer = torch.randn(asked.video.shape, generator=torch.Generator().manual_seed(5)), Trainer(config, clips, Alone('cpu'))
        for batch, _ in TrainingClips(clips, 0).portions(range(64), range(steps), 64, 1):
            with plain_attention(): take_step(trainer, batch)
            if trainer.progress.step % every: continue
            with torch.no_grad():
                model, sigma = trainer.average.eval(), torch.full((64,), 32/trainer.average.framework.sigma_in)
                curve[trainer.progress.step] = round((model(model.framework.diffuse(asked.video, noise, sigma), sigma, model.conditions(asked.captions))[0] - asked.video).square().mean().item(), 5)
    finally: PRESETS['mini'] = kept
    return dict(says=READING[kind], error=curve)

def floors(clips: int = 32) -> dict:
    "Mean square error, on the clips of `read_trial`, of the mean of 96 other clips that share: all that the caption says; all but the motion; only the background."
    size = dict(subjects=16, frames=4, stride=4)
    held, others, found = Emoji(split='held_out', seed=7, **size), Emoji(split='all', seed=11, **size), {}
    for says, words in (('all', ('subject', 'motion', 'speed', 'background', 'colours')), ('no motion', ('subject', 'background', 'colours')), ('background', ('background', 'colours'))):
        def error(i):
            said = held.program(i)
            mean = torch.stack([to_tensor(others.clip(500 + j, **{word: said[word] for word in words}).frames) for j in range(96)]).mean(0)
            return (mean - to_tensor(held[i].frames)).square().mean().item()
        found[says] = round(sum(map(error, range(clips)))/clips, 5)
    return found

def reading(path: Path):
    "All trials of reading, each written when it is done."
    record = json.loads(path.read_text('utf-8')) if path.exists() else dict(floors=floors(), trials={})
    for kind in READING:
        if kind in record['trials']: continue
        record['trials'][kind] = read_trial(kind)
        record['protocol'] = provenance('python tests/bench_recipe.py --reading', batch=64, held_out=64, level=32, seed=0)
        write_text(path, json.dumps(record, indent=1))
        print(kind, record['trials'][kind], flush=True)

LESSON = dict(lesson=dict(lesson=500), straight=dict(lesson=0))

def lesson(path: Path, steps: int = 750, every: int = 50):
    """The recipe of mini from nothing, cut after so many steps: with a first lesson of 500, and without one. What the averaged weights answer on held-out clips at two levels, for the right
    caption and for another motion, along the way. Each trial is written when it is done."""
    record = json.loads(path.read_text('utf-8')) if path.exists() else dict(trials={})
    for kind, changes in LESSON.items():
        if kind in record['trials']: continue
        curve = {}
        def watch(trainer):
            p = trainer.progress
            if p.step % every: return
            curve[p.step] = dict(loss=round(sum(p.losses)/len(p.losses), 5), errors=errors(trainer.average.eval(), (16, 64)))
            p.losses, p.sigmas = [], []
            print(kind, p.step, curve[p.step], flush=True)
        steps_of(recipe('mini', run='', workers=1, **changes), steps, watch, whole=True)
        record['trials'][kind] = dict(changes=changes, curve=curve)
        record['protocol'] = provenance('python tests/bench_recipe.py --lesson', steps=steps, batch=16, held_out=64, seed=0, schedule=f'the first {steps} steps of the recipe, its learning rate unchanged')
        write_text(path, json.dumps(record, indent=1))


def profile(name: str = 'last', steps: int = 6) -> dict:
    "Share of a step's processor time by kind of operation, largest first."
    from torch.profiler import ProfilerActivity, profile as recorded
    with tempfile.TemporaryDirectory() as folder:
        model, config = settings(name, Path(folder)/'run')
        Path(config.run).mkdir()
        kept, PRESETS['mini'] = PRESETS['mini'], model
        try:
            with recorded(activities=[ProfilerActivity.CPU]) as seen: steps_of(config, steps, lambda trainer: None)
        finally: PRESETS['mini'] = kept
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    total = sum(times.values())
    return dict(protocol=provenance('python tests/bench_recipe.py --profile', trial=name, steps=steps), shares={key: round(t/total, 4) for key, t in sorted(times.items(), key=lambda item: -item[1]) if t > .005*total})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help=f'trials: {", ".join(TRIALS)} (default: all)')
    parser.add_argument('--seconds', type=float, default=480, help='processor seconds of a trial (default: 480)')
    parser.add_argument('--folder', type=Path, default=RESULTS/'recipe', help='where the records lie (default: data/results/recipe)')
    parser.add_argument('--force', action='store_true', help='measure again what is there')
    parser.add_argument('--model', help='only this finished model, a folder or a shipped name')
    parser.add_argument('--returning', action='store_true', help='only the samples of motions that return')
    parser.add_argument('--reading', action='store_true', help='only the trials of reading')
    parser.add_argument('--lesson', action='store_true', help='only the trials of a first lesson')
    parser.add_argument('--profile', action='store_true', help='only the profile of a step')
    o = parser.parse_args()
    if unknown := [name for name in o.names if name not in TRIALS]: parser.error(f'no such trial: {", ".join(unknown)}; there are: {", ".join(TRIALS)}')
    torch.set_num_threads(1)
    o.folder.mkdir(parents=True, exist_ok=True)
    if o.returning: return returning(o.folder/'returning.json')
    if o.reading: return reading(o.folder/'reading.json')
    if o.lesson: return lesson(o.folder/'lesson.json')
    if o.model: return write_text(o.folder/f'{"shipped" if o.model == "mini" else next(folder.name for folder in Path(o.model).resolve().parents if folder.name != "run")}.json', json.dumps(finished(o.model), indent=1))
    todo = {'profile': profile} if o.profile else {name: lambda name=name: trial(name, o.seconds) for name in o.names or TRIALS}
    for name, make in todo.items():
        path = o.folder/f'{name}.json'
        if path.exists() and not o.force: continue
        told = make()
        write_text(path, json.dumps(told, indent=1))
        print(name, json.dumps({key: value for key, value in told.items() if key in ('steps', 'per_step', 'parameters', 'judged', 'shares')}), flush=True)


if __name__ == '__main__': main()

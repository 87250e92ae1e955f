"""What `mini`'s network learns from a hundred shots of real film: what it learns by heart and what it makes anew; not part of the tests.

    python tests/bench_film.py              # 2,000 steps of 16 clips; the same command goes on after a stop
    python tests/bench_film.py --steps 3000 # longer, in a folder of its own

Every tenth shot of `data/film` is kept from training. The run is `mini`'s recipe on data of one's own (`AT_HOME`), from nothing, with clips of every first, second or third frame. Leaves data/results/film/film.json: the log; the error of the
averaged weights on 36 clips of known shots and on all 36 of unknown ones, by effective noise, at every 500 steps and at the end; and for 24 samples (12 captions of known shots, 8 of unknown ones, 4 sentences that no shot has) the nearest
of all training clips (mean square over all values), with the same distance for real clips of unknown shots; and a picture of every sample over its nearest clip."""
import argparse, json, os, shutil
from dataclasses import asdict
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import torch
from snapvideo_nb.blocks import plain_attention
from snapvideo_nb.data import data_folder, open_data
from snapvideo_nb.model import SnapVideo
from snapvideo_nb.runs import load_tensors, provenance, write_text
from snapvideo_nb.sampling import sample
from snapvideo_nb.training import AT_HOME, recipe, train
from snapvideo_nb.video import collate, save_image, to_frames, to_tensor

ROOT = Path(__file__).resolve().parent.parent
EVERY = 500  # steps between two looks at the errors
RESULTS, LEVELS, SHAPE, STRIDES = ROOT/'data'/'results'/'film', (.25, 1, 4, 16, 64), (16, 18, 32), (1, 2, 3)
NEW = ('a pink butterfly in the dark forest', 'a flying squirrel stands on a green meadow', 'a grey rabbit flies through the blue sky', 'a red apple on a white background')


def split(folder: Path) -> tuple[Path, Path]:
    "Two folders of film, known and unknown: every tenth shot is unknown."
    head, *rows = (data_folder('film')/'metadata.csv').read_text('utf-8').splitlines()
    for name in ('known', 'unknown'):
        mine = [row for k, row in enumerate(rows) if (k % 10 == 9) == (name == 'unknown')]
        (folder/name).mkdir(parents=True, exist_ok=True)
        for row in mine: shutil.copy(data_folder('film')/row.split(',')[0], folder/name)
        write_text(folder/name/'metadata.csv', '\n'.join([head, *mine]) + '\n')
    return folder/'known', folder/'unknown'


def some(clips, count: int) -> list:
    "So many clips, evenly spread over the set."
    return [clips[i] for i in np.linspace(0, len(clips) - 1, count).round().astype(int)]


@torch.no_grad()
def errors(model, clips) -> dict:
    "Mean square error by effective noise, with the clips' captions."
    batch, found = collate(clips), {}
    noise, told = torch.randn(batch.video.shape, generator=torch.Generator().manual_seed(5)), model.conditions(batch.captions, batch.fps, batch.size)
    for level in LEVELS:
        sigma = torch.full((len(clips),), level/model.framework.sigma_in)
        x = model.framework.diffuse(batch.video, noise, sigma)
        found[level] = round((torch.cat([model(x[i:i + 16], sigma[i:i + 16], told[i:i + 16])[0] for i in range(0, len(clips), 16)]) - batch.video).square().mean().item(), 5)
    return found


def nearest(clip, clips) -> tuple[int, float]:
    "The clip with the least mean square difference, and the difference (values lie in [-1, 1])."
    distances = torch.cat([(part - clip).square().flatten(1).mean(1) for part in clips.split(128)])
    return int(distances.argmin()), round(distances.min().item(), 5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=2000)
    steps, threads = parser.parse_args().steps, int(os.environ['OMP_NUM_THREADS'])
    torch.set_num_threads(threads)
    run = ROOT/'runs'/f'film-{steps}'
    folders = split(run.parent/'film-split')
    config = recipe('mini', **AT_HOME, run=str(run), data=str(folders[0]), data_options=dict(stride=list(STRIDES)), steps=steps, sample_every=EVERY, checkpoint_every=EVERY, keep=steps//EVERY + 1, log_every=100)
    if not (run/'model').exists(): train(config)
    known, unknown = (open_data(str(folder), *SHAPE, stride=STRIDES) for folder in folders)
    model, probes = SnapVideo.from_pretrained(str(run/'model')).eval(), dict(known=some(known, len(unknown)), unknown=some(unknown, len(unknown)))
    curve = []
    with plain_attention():
        for step in range(EVERY, steps, EVERY):
            kept = SnapVideo.from_pretrained(str(run/'model')).eval()
            load_tensors(run/'checkpoints'/f'step-{step:08d}', {f'average.{name}': value for name, value in kept.state_dict().items()})
            curve.append(dict(step=step) | {name: errors(kept, clips) for name, clips in probes.items()})
        curve.append(dict(step=steps) | {name: errors(model, clips) for name, clips in probes.items()})
    taught = torch.stack([to_tensor(clip.frames) for clip in (known[i] for i in range(len(known)))])
    asked = [('known', clip.caption) for clip in some(known, 12)] + [('unknown', caption) for caption in dict.fromkeys(clip.caption for clip in probes['unknown'])][:8] + [('new', caption) for caption in NEW]
    made, rows = sample(model, [caption for _, caption in asked], steps=32, guidance=1., fps=8.), []
    RESULTS.mkdir(parents=True, exist_ok=True)
    for k, ((kind, caption), video) in enumerate(zip(asked, made)):
        j, distance = nearest(video, taught)
        rows.append(dict(kind=kind, caption=caption, seed=k, nearest=known.captions[j], distance=distance, same_caption=known.captions[j] == caption))
        pair = [np.concatenate(list(to_frames(clip)[::3]), 1) for clip in (video, taught[j])]
        save_image(RESULTS/f'pair-{k:02d}.png', np.concatenate(pair), force=True)
    constant = {name: round((torch.stack([to_tensor(clip.frames) for clip in clips]) - taught.mean(0)).square().mean().item(), 5) for name, clips in probes.items()}  # what the mean of all known clips errs by
    real = [nearest(to_tensor(clip.frames), taught)[1] for clip in probes['unknown']]
    log = [json.loads(line) for line in (run/'log.jsonl').read_text('utf-8').splitlines()]
    write_text(RESULTS/'film.json', json.dumps(dict(
        protocol=provenance('python tests/bench_film.py' + f' --steps {steps}'*(steps != 2000), threads=threads, clips=dict(known=len(known), unknown=len(unknown)), shots=dict(known=len(set(known.captions)), unknown=len(set(unknown.captions))),
                            probes=len(unknown), sampler=dict(solver='heun', steps=32, guidance=1., fps=8.), config=asdict(config) | dict(run='', data='data/film without every tenth shot'), seconds=log[-1]['seconds']),
        levels=LEVELS, constant=constant, curve=curve, samples=rows, real=real, log=[{key: row[key] for key in ('step', 'clips', 'loss')} for row in log]), indent=1))


if __name__ == '__main__': main()

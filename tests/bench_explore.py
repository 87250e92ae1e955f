"""How long the widgets take to answer: python tests/bench_explore.py [ROUNDS]

Moves every control of every widget through its values, ROUNDS times (default 3), in this process, and prints for each the median and the worst
time from a changed value to new pictures and text (the kernel's part; sending and drawing come on top). The aim is 100 ms. Leaves data/results/explore/response.json. Nothing is asserted: times depend on the machine.
"""
import json, statistics, sys, time
from pathlib import Path

import ipywidgets as W
import torch

from snapvideo_nb.runs import provenance, write_text
from snapvideo_nb.widgets import anatomy_widget, bench_widget, player_widget, redundancy_widget, scaling_widget


RECORD = Path(__file__).resolve().parent.parent/'data'/'results'/'explore'/'response.json'


def values(control):
    "Up to eight values of a control, over its range."
    if hasattr(control, 'options'): return [option[1] if isinstance(option, tuple) else option for option in control.options]
    if isinstance(control, W.Checkbox): return [False, True]
    low, high = control.min, control.max
    if isinstance(control, W.FloatLogSlider): return [10**(low + (high - low)*k/7) for k in range(8)]
    spread = [low + (high - low)*k/7 for k in range(8)]
    return [round(v) for v in spread] if isinstance(control, W.IntSlider) else spread


def main(rounds=3):
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds')
    print(f'{"widget":12}{"control":12}{"median":>8}{"worst":>8}')
    measured = {}
    for make in (redundancy_widget, player_widget, bench_widget, anatomy_widget, scaling_widget):
        widget, shell = make.__name__.removesuffix('_widget'), make()
        for name, control in shell.controls.items():
            took = []
            for _ in range(rounds):
                for value in values(control):
                    if value == control.value: continue
                    began = time.perf_counter()
                    control.value = value
                    took.append(round(1e3*(time.perf_counter() - began), 1))
            measured.setdefault(widget, {})[name] = dict(median=statistics.median(took), worst=max(took), changes=len(took))
            print(f'{widget:12}{name:12}{statistics.median(took):8.1f}{max(took):8.1f}', flush=True)
    write_text(RECORD, json.dumps(dict(protocol=provenance(f'python tests/bench_explore.py {rounds}', threads=torch.get_num_threads(), unit='milliseconds in the kernel, from a changed value to new pictures and text'), controls=measured), indent=1) + '\n')


if __name__ == '__main__': main(*map(int, sys.argv[1:]))

"""What a training step costs on one GPU, and what makes it faster or smaller: one run, one table; not part of the tests.

    python tests/bench_step.py                                  # FIT 500M on the first GPU: under 8 minutes on an H100, by estimate
    python tests/bench_step.py --preset tiny --device cpu       # the same on a CPU

The step is that of `snapvideo scale`: a FIT's extra pass for nine clips in ten, forward, backward and AdamW, on random inputs; no text encoder, no loader, no moving average.
It begins in the usual way (bf16 by autocast, not compiled, torch's fused attention, AdamW tensor by tensor in groups) with 1, 2, 4, ... clips until memory is full.
With the largest batch that fitted, one thing after the other is changed: fused AdamW, compiling, both, recomputing in the backward pass (also with the batch that should then fit), attention that
keeps its scores, tf32, fp32, and at last compiling, fused AdamW and recomputing together. A way that does not fit says so and is tried with half the clips. Every row has

* milliseconds per clip with quartiles, after warm-up steps that do not count;
* its share of the rate at which this machine multiplies large bf16 matrices, measured at the start (and once more at the end: `rate_after`); the aim is 50 %. Work is counted for the
  usual way, so recomputing earns nothing;
* the peak of memory beside the formula: weights, gradients, two moments, what the forward pass keeps. With recomputing: one block's activations, and what enters the others. It knows
  neither buffers nor what a compiler saves. On a GPU the peak is torch's count of the timed steps (`reserved_bytes`: what torch asked of the card); on a CPU that of a process of its own,
  not compiled, so a compiled row has none there.

The fastest row is then taken apart: seconds of the extra pass, of forward and backward, of the optimizer; an evaluation by parts of the network (not compiled, every operation timed alone); the
kernels of one step, by name and by kind, and for which share of the step the GPU was busy with them.

The record is written after every row. The same command continues it: rows that it holds are not measured again, those left out or failed are. A record of other conditions (machine, torch, commit,
...) is refused. Rows that would end after `--minutes` are left out, and the record says which; with minutes to spare, run it again.

So far this has run on CPUs only. No figure of a GPU has been measured with it yet."""
import argparse, gc, json, re, sys, time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from snapvideo_nb.blocks import plain_attention
from snapvideo_nb.fit import FITConfig
from snapvideo_nb.model import PRESETS
from snapvideo_nb.runs import provenance, write_text
from snapvideo_nb.scaling import memory, training_work
from snapvideo_nb.speed import Machine, Passes, anatomy, matrix_rate, measured_machine, peak_bytes, quartiles, synchronize, take_turns, usual_batch

FULL = 'out of memory'
CHANGES = [dict(optimizer='fused'), dict(compile=True), dict(compile=True, optimizer='fused'), dict(recompute=True), dict(attention='plain'), dict(precision='tf32'), dict(precision='fp32'),
           dict(compile=True, optimizer='fused', recompute=True)]
KINDS = {'attention': 'flash|fmha|sdpa|attention', 'matrix products': 'gemm|nvjet|cutlass|xmma|mm$|mkldnn_.*linear', 'optimizer': 'multi_tensor|foreach|fused_adam', 'compiled': 'triton|^## Call', 'copies': 'copy|memcpy|memset|CatArray|aten::cat'}


@dataclass(frozen=True)
class Way:
    "A way to do the step."
    precision: str = 'bf16'
    compile: bool = False
    recompute: bool = False
    attention: str = 'fused'
    optimizer: str = 'foreach'
    batch: int = 1

    def __str__(self):
        return ', '.join([self.precision, *['compiled']*self.compile, *['recomputed']*self.recompute, f'{self.attention} attention', f'AdamW {self.optimizer}', f'{self.batch} clip{"s"*(self.batch > 1)}'])


@lru_cache(None)
def formula(network, precision: str, plain: bool, text_tokens: int) -> dict[str, int]:
    "`scaling.memory` of one clip: it is linear in the clips."
    with plain_attention(plain): return memory(network, 1, precision, text_tokens)


def formula_bytes(network, way: Way, text_tokens: int) -> int | None:
    "Bytes that the step holds, by counting; None where nothing is known (a U-Net that recomputes)."
    told = 'bf16' if way.precision == 'bf16' else 'fp32', way.attention == 'plain', text_tokens
    m = formula(network, *told)
    clip = m['activations']
    if way.recompute:
        if not isinstance(network, FITConfig): return None
        entering = 4*(torch.Size(network.grid).numel()*network.patch_width + network.latents*network.latent_width)
        clip = formula(replace(network, blocks=1), *told)['activations'] + (network.blocks - 1)*entering
    return m['weights'] + m['gradients'] + m['optimizer'] + m['once'] + way.batch*clip


@lru_cache(None)
def flops(network, text_tokens: int) -> tuple[float, float]:
    "FLOPs of a step for one clip without the extra pass, and those of the extra pass."
    without = training_work(network, 0., text_tokens)
    return without, training_work(network, 1., text_tokens) - without


def reason(error: BaseException) -> str:
    "Why something did not work, in a line. A compiler may have wrapped an error of memory into its own."
    seen = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)) or re.search("out of memory|can't allocate memory|ALLOC_FAILED", str(seen)): return FULL
        seen = seen.__cause__ or seen.__context__
    return f'{type(error).__name__}: {(str(error).strip().splitlines() or ["no reason given"])[0]}'[:300]


def attempt(work) -> dict:
    "What `work()` gives, or why it gave nothing. On return the exception is gone, and with it every tensor that its frames held: only then can memory be given back."
    try: return work()
    except Exception as error: return dict(why=reason(error))


def clear():
    "Give back the memory of what is no longer used, compiled functions too."
    if 'torch._dynamo' in sys.modules: torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def phases(passes: Passes, rounds: int) -> dict[str, float]:
    "Milliseconds per clip (medians) of the extra pass, of forward and backward (what is left of the step), and of the optimizer."
    def extra():
        with plain_attention(not passes.fused): passes.extra()
    seconds = take_turns(dict(step=passes.train, extra=extra), rounds, 1, passes.device)
    for p in passes.network.parameters(): p.grad = torch.zeros_like(p)
    seconds |= take_turns(dict(optimizer=passes.optimizer.step), rounds, 1, passes.device)
    passes.optimizer.zero_grad()
    step, extra, optimizer = (1e3*quartiles(seconds[name])[1]/passes.batch for name in ('step', 'extra', 'optimizer'))
    return {'extra pass': extra, 'forward and backward': step - extra - optimizer, 'optimizer': optimizer}


def kernels(passes: Passes, step: float, top: int = 15) -> dict:
    "What one step of `step` milliseconds spends its time on, as torch's profiler sees it: kernels of a GPU, operations of a CPU; the longest `top`, all by kind, in milliseconds. ValueError when it sees none."
    from torch.profiler import ProfilerActivity, profile
    cuda = torch.device(passes.device).type == 'cuda'
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*cuda) as seen:
        passes.train()
        synchronize(passes.device)
    names, kinds = Counter(), Counter()
    for event in seen.key_averages():
        if getattr(event, 'is_user_annotation', False) or cuda and (not str(event.device_type).endswith('CUDA') or event.key.startswith('##')): continue
        ms = (event.self_device_time_total if cuda else event.self_cpu_time_total)/1e3
        names[event.key[:160]] += ms
        kinds[next((kind for kind, words in KINDS.items() if re.search(words, event.key, re.IGNORECASE)), 'the rest')] += ms
    if not sum(names.values()): raise ValueError('the profiler saw no kernel')
    return dict(longest=dict(names.most_common(top)), kinds=dict(kinds.most_common())) | (dict(busy=sum(names.values())/step) if cuda else {})


class Bench:
    "The rows of a record, measured one by one and kept at once. ValueError when the file holds other conditions, or none."
    def __init__(self, preset: str, device: str, path: Path, rounds: int = 10, warmup: int = 3, minutes: float = 8, say=print):
        self.began, self.network, self.tokens, self.device, self.cuda = time.monotonic(), PRESETS[preset].network, PRESETS[preset].text['length'], device, torch.device(device).type == 'cuda'
        self.path, self.rounds, self.warmup, self.minutes, self.say = path, rounds, warmup, minutes, say
        card = dict(card_bytes=torch.cuda.get_device_properties(device).total_memory, cuda=torch.version.cuda) if self.cuda else {}
        protocol = provenance('python tests/bench_step.py', device, preset=preset, text_tokens=self.tokens, rounds=rounds, warmup=warmup, figures='medians and quartiles of milliseconds per clip',
                              work='training_work of the usual way: extra pass for the share `extra_pass` of the clips, forward, backward', share='of the measured bf16 matrix rate', **card)
        self.record = dict(protocol=protocol, machine={}, rows=[], left_out=[])
        if path.exists(): self.resume()

    def resume(self):
        "Go on with the record that the file holds."
        try: held = json.loads(self.path.read_text('utf-8'))
        except ValueError: held = {}
        if not isinstance(held, dict) or not {'protocol', 'machine', 'rows'} <= held.keys(): raise ValueError(f'{self.path}: not a record of this command; choose another file')
        then, now = ({key: value for key, value in told.items() if key not in ('command', 'date')} for told in (held['protocol'], self.record['protocol']))
        if then != now: raise ValueError(f"{self.path} was measured in other conditions ({', '.join(key for key in now | then if then.get(key) != now.get(key))}); choose another file")
        self.record = held | dict(rows=[row for row in held['rows'] if 'ms' in row or row['why'] == FULL], left_out=[])

    def keep(self): write_text(self.path, json.dumps(self.record, indent=1))

    @cached_property
    def limit(self) -> int:
        "The most clips that are tried: on a CPU what half of its memory holds by the formula."
        return 1024 if self.cuda else usual_batch(self.network)

    def left(self) -> float:
        "Seconds until the time is over."
        return 60*self.minutes - (time.monotonic() - self.began)

    def roofs(self):
        "What the machine can do at best, measured once for a record: bf16 products and copies, and products in the other precisions. A GPU is woken up first."
        if self.record['machine']: return
        if self.cuda: matrix_rate('bf16', self.device, rounds=300)
        roof = measured_machine('bf16', self.device)
        self.record['machine'] = dict(rate=roof.rate, bandwidth=roof.bandwidth, rates=dict(bf16=roof.rate) | {p: matrix_rate(p, self.device) for p in ['tf32']*self.cuda + ['fp32']})
        clear()
        self.keep()

    def same(self, way: Way, row: dict) -> bool: return all(row[key] == value for key, value in asdict(way).items())

    def expected(self, way: Way) -> float:
        "Seconds that a row will take: its clips as fast as the best so far of that precision, or at a third of the matrix rate; some seconds to build; a minute and a half to compile, less when a cache knows it."
        known = [row['ms']/1e3 for row in self.record['rows'] if 'ms' in row and row['precision'] == way.precision]
        clip = min(known) if known else 3*sum(flops(self.network, self.tokens))/self.record['machine']['rates'][way.precision]
        warm = any(row['compile'] and (row['recompute'], row['batch']) == (way.recompute, way.batch) for row in self.record['rows'])
        return (self.rounds + self.warmup)*way.batch*clip*(1 + way.recompute/3) + (4 if self.cuda else 12) + way.compile*(30 if warm else 90)

    def passes(self, way: Way) -> Passes:
        "The network and its step in this way, with weights and optimizer of its own."
        torch.manual_seed(0)
        passes = Passes(self.network, way.batch, way.precision, self.device, self.tokens, way.compile, way.recompute, way.attention == 'fused')
        passes.optimizer = torch.optim.AdamW(passes.network.parameters(), **{way.optimizer: True})
        return passes

    def measure(self, way: Way) -> dict:
        "Time and peak of the step. Raises what torch raises."
        before = torch.cuda.memory_allocated() if self.cuda else 0
        passes = self.passes(way)
        for _ in range(self.warmup): passes.train()
        synchronize(self.device)
        if self.cuda: torch.cuda.reset_peak_memory_stats()
        seconds = take_turns({'': passes.train}, self.rounds, 0, self.device)['']
        low, middle, high = (1e3*s/way.batch for s in quartiles(seconds))
        step, extra = flops(self.network, self.tokens)
        work, rates = step + passes.share*extra, self.record['machine']['rates']
        row = dict(extra_pass=passes.share, gflop=work/1e9, ms=middle, low=low, high=high, share=work/(middle/1e3)/rates['bf16'], share_of_own=work/(middle/1e3)/rates[way.precision])
        if self.cuda: return row | dict(peak_bytes=torch.cuda.max_memory_allocated() - before, reserved_bytes=torch.cuda.max_memory_reserved())
        del passes
        options = dict(batch=way.batch, precision=way.precision, device=self.device, text_tokens=self.tokens, recompute=way.recompute, fused=way.attention == 'fused')
        return row | dict(peak_bytes=None) | ({} if way.compile else attempt(lambda: dict(peak_bytes=peak_bytes(self.network, **options))))

    def row(self, way: Way) -> dict:
        "The row of a way: that of the record, or measured now and kept; an empty one when there is no time for it."
        if found := next((row for row in self.record['rows'] if self.same(way, row)), None): return found
        if self.expected(way) > self.left() - self.closing(way):
            self.record['left_out'].append(str(way))
            self.keep()
            self.say(f'{way}: left out, no time')
            return {}
        began = time.monotonic()
        attempt(clear)
        row = asdict(way) | attempt(lambda: self.measure(way))
        row |= dict(formula_bytes=formula_bytes(self.network, way, self.tokens), seconds=round(time.monotonic() - began, 1))
        self.record['rows'].append(row)
        self.keep()
        self.say(f'{way}: {told(row)}')
        return row

    def closing(self, way: Way | None = None) -> float:
        "Seconds set aside for taking the fastest row apart: little before there is one, and more when it has to be compiled again."
        return 25. + 30*(way is not None and (way.compile or any(row['compile'] and 'ms' in row for row in self.record['rows'])))

    def search(self, way: Way, batch: int, up: bool = False) -> int:
        "Rows from `batch` clips on: half as many while memory is full; with `up` twice as many while they fit. The largest batch that fitted; 0 for none, for a failure and where time is over."
        row = self.row(replace(way, batch=batch))
        while row.get('why') == FULL and batch > 1:
            batch, up = batch//2, False
            row = self.row(replace(way, batch=batch))
        if 'ms' not in row: return 0
        while up and 2*batch <= self.limit and 'ms' in self.row(replace(way, batch=2*batch)): batch *= 2
        return batch

    def best(self) -> dict | None:
        "The row with the least time per clip."
        return min((row for row in self.record['rows'] if 'ms' in row), key=lambda row: row['ms'], default=None)

    def run(self, compile: bool = True) -> dict:
        "All rows, then the fastest taken apart; the record."
        self.roofs()
        changes = [change for change in CHANGES if (compile or 'compile' not in change) and (self.cuda or change.get('precision') != 'tf32')]
        guess = self.fitting(Way())
        planned = [Way(batch=2**k) for k in range(guess.bit_length())] + [Way(**change, batch=guess) for change in changes] + [Way(recompute=True, batch=self.fitting(Way(recompute=True)))]
        todo = [way for way in planned if not any(self.same(way, row) for row in self.record['rows'])]
        self.say(f"{self.record['protocol']['hardware']}: {self.record['machine']['rate']/1e12:.3g} TFLOP/s in bf16. About {(sum(map(self.expected, todo)) + self.closing(planned[-1]))/60:.0f} minutes "
                 f'by estimate; rows that would end after {self.minutes:g} are left out.')
        most = roomy = self.search(Way(), 1, up=True) or 1
        for way in [Way(**change) for change in changes]:
            self.search(way, roomy if way.compile and way.recompute else most)
            if way == Way(recompute=True): roomy = self.search(way, max(most, self.fitting(way))) or most
        if best := self.best(): self.take_apart(Way(**{key: best[key] for key in asdict(Way())}), best)
        attempt(clear)
        self.record['machine'] |= attempt(lambda: dict(rate_after=matrix_rate('bf16', self.device)))
        self.keep()
        return self.record

    def fitting(self, way: Way) -> int:
        "The largest power of two of clips, up to `limit`, that should fit in this way by the formula."
        if not self.cuda: return self.limit
        batch, card = 1, self.record['protocol']['card_bytes']
        while 2*batch <= self.limit and (formula_bytes(self.network, replace(way, batch=2*batch), self.tokens) or card) < card: batch *= 2
        return batch

    def take_apart(self, way: Way, row: dict):
        "Where the fastest row spends its time, kept in the record; each of three views that fails says why."
        held = self.record.get('fastest', {})
        if held.get('way') == asdict(way) and not any('why' in held.get(view, {'why': ''}) for view in ('phases', 'kernels', 'parts')): return
        attempt(clear)
        self.record['fastest'] = dict(way=asdict(way)) | attempt(lambda: self.views(way, row))
        self.keep()

    def views(self, way: Way, row: dict) -> dict:
        "Phases and kernels of a step, parts of an evaluation."
        passes, machine = self.passes(way), self.record['machine']
        for _ in range(self.warmup): passes.train()
        found = dict(phases=attempt(lambda: phases(passes, self.rounds)), kernels=attempt(lambda: kernels(passes, row['ms']*way.batch)))
        passes.resize(way.batch)  # from here on not compiled
        return found | dict(parts=attempt(lambda: anatomy(passes, Machine('', machine['rates'][way.precision], machine['bandwidth']), 3)))


def told(row: dict) -> str:
    "A row in words."
    size = lambda bytes: '?' if bytes is None else f'{bytes/1e9:.3g}'
    if 'ms' not in row: return f"{row['why']} (formula {size(row['formula_bytes'])} GB)"
    return f"{row['ms']:.3g} ms per clip ({row['low']:.3g}-{row['high']:.3g}), {row['share']:.1%} of the rate, {size(row['peak_bytes'])} GB (formula {size(row['formula_bytes'])})"


def summary(record: dict, best: dict | None) -> str:
    "The fastest row and where its time goes, in lines."
    if best is None: return 'no row could be measured'
    lines, apart = [f'Fastest: {Way(**{key: best[key] for key in asdict(Way())})}: {told(best)}; the aim is 50 %.'], record['fastest']
    for view, unit in (('phases', 'ms per clip'), ('kernels', 'ms in one step'), ('parts', 'ms of an evaluation, beside the least by the roofline')):
        found = apart.get(view, apart)
        if 'why' in found: lines.append(f"{view}: {found['why']}"); continue
        lines.append(f"{view}, {unit}" + (f" (the GPU was busy for {found['busy']:.0%} of the step)" if 'busy' in found else ''))
        rows = found['kinds'] | found['longest'] if view == 'kernels' else found
        lines += [f'{value:12.3f}  {name}' if view != 'parts' else f"{1e3*value['seconds']:12.3f} {1e3*value['roof']:12.3f}  {name}" for name, value in rows.items()]
    return '\n'.join(lines + [f'left out: {way}' for way in record['left_out']])


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', choices=list(PRESETS), default='fit-500m'); parser.add_argument('--device', default='cuda')
    parser.add_argument('--rounds', type=int, default=10, help='steps that count, per row'); parser.add_argument('--warmup', type=int, default=3, help='steps before that do not')
    parser.add_argument('--minutes', type=float, default=8, help='rows that would end later are left out'); parser.add_argument('--compile', action=argparse.BooleanOptionalAction, default=True, help='also the rows that compile')
    parser.add_argument('--json', type=Path, help='the record (default: runs/step-PRESET.json)')
    o = parser.parse_args(arguments)
    if o.rounds < 1 or o.warmup < 1: parser.error('--rounds and --warmup must be at least 1')
    try: kind = torch.device(o.device).type
    except RuntimeError: parser.error(f'--device {o.device}: no such device')
    if kind not in ('cpu', 'cuda'): parser.error(f'--device must be cuda or cpu, not {o.device}')
    if kind == 'cuda' and (torch.device(o.device).index or 0) >= torch.cuda.device_count(): parser.error(f'--device {o.device}: torch finds no such GPU; a CPU does it with --preset tiny --device cpu')
    path = o.json or Path(f'runs/step-{o.preset}.json')
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.cuda.device(o.device) if kind == 'cuda' else nullcontext():
        try: bench = Bench(o.preset, o.device, path, o.rounds, o.warmup, o.minutes, say=lambda line: print(line, flush=True))
        except ValueError as error: parser.error(str(error))
        print(summary(bench.run(o.compile), bench.best()), f'Record: {path}', sep='\n')


if __name__ == '__main__': main()

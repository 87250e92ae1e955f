"Sampling: bits that do not depend on company, orders of the solvers, closed forms, what callbacks see, clear errors."
import json, math
from functools import partial
import numpy as np, pytest, torch

import bench_sampling
from snapvideo_nb.diffusion import GaussianMixture
from snapvideo_nb.model import SnapVideo
from snapvideo_nb.guidance import Guidance, GuidedBatch, dynamic_threshold
from snapvideo_nb.sampling import Trajectory, sample, seeded_noise
from snapvideo_nb.solvers import SOLVERS, Denoise, State, churn_step, dpm_step, euler_step, heun_step, noise_levels, solve
from snapvideo_nb.text import train_tokenizer

CAPTIONS = [f'a {subject} moves {direction} on a {ground} background'
            for subject in ('red apple', 'snail') for direction in ('left', 'right') for ground in ('blue', 'green')]
SEEDS = list(range(10, 18))
MIXTURE = GaussianMixture(torch.tensor([[-.8], [.2], [.7]]), torch.tensor([.2, .15, .2]), torch.tensor([.3, .4, .3]))


@pytest.fixture(scope='module')
def model():
    "The tiny preset with a self-conditioning gate that is open: at initialisation it is zero, and latents would change nothing."
    torch.manual_seed(0)
    model = SnapVideo.from_preset('tiny', tokenizer_json=train_tokenizer(CAPTIONS, 300).to_json())
    with torch.no_grad(): model.network.gate.weight.normal_(0, .5)
    return model


@pytest.fixture(scope='module', params=[0., 2.], ids=['unguided', 'guided'])
def eight(request, model): return request.param, sample(model, CAPTIONS, SEEDS, steps=4, guidance=request.param)


@pytest.mark.parametrize('rows', [[0], [6], [2, 5, 1], [7, 6, 5, 4, 3, 2, 1, 0], [3, 3, 0]], ids=str)
def test_a_clip_has_the_same_bits_in_any_company(model, eight, rows):
    guidance, together = eight
    some = sample(model, [CAPTIONS[i] for i in rows], [SEEDS[i] for i in rows], steps=4, guidance=guidance)
    assert torch.equal(some, together[rows])


def test_seeds_and_captions_matter(model, eight):
    guidance, together = eight
    assert not torch.equal(sample(model, CAPTIONS[:1], [99], steps=4, guidance=guidance)[0], together[0])
    assert not torch.equal(sample(model, CAPTIONS[1:2], SEEDS[:1], steps=4, guidance=guidance)[0], together[0])


@pytest.mark.parametrize('micro_batch', [2, 3, 8])
def test_micro_batches_change_no_more_than_rounding(model, eight, micro_batch):
    guidance, together = eight
    torch.testing.assert_close(sample(model, CAPTIONS, SEEDS, steps=4, guidance=guidance, micro_batch=micro_batch), together, atol=1e-4, rtol=0)


def test_sampling_leaves_the_global_generator_alone(model):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    sample(model, CAPTIONS[:1], steps=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_frame_rate_and_size_may_differ_per_clip(model):
    both = sample(model, CAPTIONS[:2], steps=2, fps=[8., 24.], size=[(9, 16), (720, 1280)])
    assert torch.equal(both[1:], sample(model, CAPTIONS[1:2], [1], steps=2, fps=24., size=(720, 1280)))
    assert not torch.equal(both[1:], sample(model, CAPTIONS[1:2], [1], steps=2))
    torch.testing.assert_close(sample(model, CAPTIONS[:2], steps=2, fps=[8., 24.], size=[(9, 16), (720, 1280)], micro_batch=4), both, atol=1e-4, rtol=0)


def test_result_is_a_video(model):
    clip = sample(model, CAPTIONS[:1], steps=2)
    assert not clip.requires_grad and not GuidedBatch(model, CAPTIONS[:1])(seeded_noise([0], model.shape), 1.)[0].requires_grad
    assert clip.shape == (1, *model.shape) and clip.dtype == torch.float32 and clip.abs().max() <= 1 and not model.training


# Guidance

class Counting:
    "A model that counts its evaluations and keeps the batch sizes."
    def __init__(self, model): self.inner, self.batches = model, []
    def __getattr__(self, name): return getattr(self.inner, name)
    def __call__(self, x, *args):
        self.batches.append(len(x))
        return self.inner(x, *args)


def test_no_guidance_costs_one_evaluation_and_any_other_two(model):
    x = seeded_noise([0, 1, 2], model.shape)
    for guidance, expected in ((0., [2, 2]), (1.5, [4, 4]), (-1., [4, 4])):
        counting = Counting(model.eval())
        GuidedBatch(counting, CAPTIONS[:3], guidance, micro_batch=2)(x, 1.)
        assert counting.batches == expected


def test_guidance_of_zero_is_the_model_itself(model):
    x = seeded_noise([0, 1, 2], model.shape)
    with torch.no_grad(): expected = model.eval()(x.float(), 1., model.conditions(CAPTIONS[:3]))[0]
    torch.testing.assert_close(GuidedBatch(model, CAPTIONS[:3], 0.)(x, 1.)[0], expected, atol=1e-5, rtol=0)


def test_guidance_is_its_formula_and_each_branch_keeps_its_latents(model):
    "Two evaluations in a row against two separate chains of the bare model."
    x, w, conditions = seeded_noise([0, 1, 2], model.shape), 3., model.eval().conditions(CAPTIONS[:3])
    batch, latents, chains = GuidedBatch(model, CAPTIONS[:3], w), None, [None, None]
    for sigma in (5., 2.):
        guided, latents = batch(x, sigma, State(None, latents))
        with torch.no_grad(): pairs = [model(x.float(), sigma, c, l) for c, l in zip((conditions, conditions.without_text()), chains)]
        (with_text, _), (without, _) = pairs
        chains = [l for _, l in pairs]
        torch.testing.assert_close(guided, with_text + w*(with_text - without), atol=1e-4, rtol=0)
        torch.testing.assert_close(latents, torch.stack(chains), atol=1e-4, rtol=1e-4)


def test_guidance_of_minus_one_is_the_model_without_text(model):
    x = seeded_noise([0], model.shape)
    with torch.no_grad(): expected = model.eval()(x.float(), 1., model.conditions(CAPTIONS[:1]).without_text())[0]
    torch.testing.assert_close(GuidedBatch(model, CAPTIONS[:1], -1.)(x, 1.)[0], expected, atol=1e-5, rtol=0)


def test_weights_of_steps_and_levels():
    swing, window = Guidance(14., oscillate=0., steady=2), Guidance(3., interval=(.1, 5.))
    assert [swing.at(k, 1.) for k in range(6)] == [14., 14., 0., 14., 0., 14.]
    assert [window.at(0, sigma) for sigma in (5.1, 5., .2, .1, .05)] == [0., 3., 3., 0., 0.]
    assert not Guidance().needed and Guidance(0., oscillate=2.).needed


def test_a_step_without_guidance_costs_one_pass_and_forgets_the_other_branch(model):
    counting, x = Counting(model.eval()), seeded_noise([0, 1], model.shape)
    batch = GuidedBatch(counting, CAPTIONS[:2], Guidance(2., interval=(.5, 2.)))
    state = State(None, batch(x, 1.)[1])
    guided, latents = batch(x, .4, state)
    assert counting.batches == [2, 2, 1, 1] and latents.shape[0] == 2 and not latents[1].any() and latents[0].any()
    with torch.no_grad(): alone = model(x[:1].float(), .4, model.conditions(CAPTIONS[:1]), state.latents[0, :1])[0]
    torch.testing.assert_close(guided[:1], alone, atol=1e-5, rtol=0)


def test_a_negative_caption_takes_the_place_of_none(model):
    x, (said, other) = seeded_noise([0], model.shape), CAPTIONS[:2]
    guided = GuidedBatch(model, [said], 2., negative=other)(x, 1.)[0]
    with torch.no_grad(): with_text, without = (model.eval()(x.float(), 1., model.conditions([c]))[0] for c in (said, other))
    torch.testing.assert_close(guided, 3*with_text - 2*without, atol=1e-4, rtol=0)
    mixed = GuidedBatch(model, [said, said], 2., negative=[other, ''], micro_batch=2)(torch.cat([x, x]), 1.)[0]
    torch.testing.assert_close(mixed, torch.cat([guided, GuidedBatch(model, [said], 2.)(x, 1.)[0]]), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match='each of the 1 clips'): GuidedBatch(model, [said], 2., negative=['a', 'b'])


def test_dynamic_threshold_has_one_limit_per_clip():
    calm, wild = torch.linspace(-.5, .5, 2001), torch.linspace(-4, 4, 2001)
    out = dynamic_threshold(torch.stack([calm, wild]))
    assert torch.equal(out[0], calm)
    torch.testing.assert_close(out[1], (wild/3.98).clamp(-1, 1), atol=1e-4, rtol=0)


def test_gradients_flow_when_asked_for(model):
    x = seeded_noise([0], model.shape).requires_grad_()
    with torch.no_grad(): denoised = GuidedBatch(model.eval(), CAPTIONS[:1], 1.)(x, 1.)[0]
    gradient, = torch.autograd.grad(denoised.square().sum(), x)
    assert gradient.shape == x.shape and gradient.abs().sum() > 0


# Solvers

def exact(x, sigma, sigma_next, sigma_in):
    "Where the probability-flow ODE carries x: in one dimension every sample keeps its quantile. By bisection, float64."
    def cdf(x, sigma):
        spread = ((MIXTURE.stds/sigma_in)**2 + sigma**2).sqrt()
        return (MIXTURE.weights*torch.special.ndtr((x - MIXTURE.means[:, 0]/sigma_in)/spread)).sum(1, keepdim=True)
    low, high, quantile = torch.full_like(x, -5*sigma_next - 1), torch.full_like(x, 5*sigma_next + 1), cdf(x, sigma)
    for _ in range(70):
        middle = (low + high)/2
        below = cdf(middle, sigma_next) < quantile
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return middle


def mixture_denoise(sigma_in): return Denoise(lambda x, sigma, state: (MIXTURE.denoise(x, sigma, sigma_in), None), sigma_in)


@pytest.mark.parametrize('sigma_in', [1., 4.])
@pytest.mark.parametrize('name, order', [('euler', 1), ('heun', 2), ('dpm++', 2)])
def test_solvers_converge_at_their_order(name, order, sigma_in):
    x = 20*torch.linspace(-1.8, 1.8, 13, dtype=torch.float64)[:, None]
    truth, errors = exact(x, 20., .02, sigma_in), []
    for steps in (256, 512):
        levels = noise_levels(steps, .02, 20.)[:-1]
        x0 = solve(mixture_denoise(sigma_in), x*levels[0]/20, levels, SOLVERS[name])
        errors.append((x0 - truth).square().mean().sqrt())
    assert abs(torch.log2(errors[0]/errors[1]).item() - order) < .15
    assert errors[1] < (1e-2, 2e-4)[order - 1]/sigma_in


def fresh(step): return seeded_noise(range(3), (2,), step)


@pytest.mark.parametrize('solver', SOLVERS.values())
def test_a_single_point_is_reached_exactly(solver):
    "All data in one point c: D = c everywhere, trajectories are straight lines, and one step is enough."
    c = torch.tensor([[.3, -.7]], dtype=torch.float64)
    denoise = Denoise(lambda x, sigma, state: (c.expand_as(x), None), sigma_in=4.)
    for steps in (1, 5):
        x = solve(denoise, 80*seeded_noise(range(3), (2,)), noise_levels(steps), solver, noise=fresh)
        torch.testing.assert_close(4*x, c.expand(3, 2), atol=1e-12, rtol=0)


@pytest.mark.parametrize('solver, evaluations', [(euler_step, 7), (heun_step, 13), (dpm_step, 7), (churn_step, 13)])
def test_number_of_evaluations(solver, evaluations):
    seen = []
    denoise = Denoise(lambda x, sigma, state: (seen.append(sigma), (x*0, None))[1], 1.)
    solve(denoise, torch.ones(1, 1), noise_levels(7), solver, noise=lambda step: torch.ones(1, 1))
    assert len(seen) == evaluations and 0 not in seen


def test_churn_of_zero_is_heun():
    x, levels = 80*seeded_noise(range(9), (1,)), noise_levels(12)
    churned = solve(mixture_denoise(4.), x, levels, partial(churn_step, gamma=0.), noise=lambda step: x)
    torch.testing.assert_close(churned, solve(mixture_denoise(4.), x, levels), atol=1e-13, rtol=0)
    outside = solve(mixture_denoise(4.), x, levels, partial(churn_step, gamma=.4, between=(100., 200.)))
    assert torch.equal(outside, solve(mixture_denoise(4.), x, levels))


@pytest.mark.parametrize('sigma_in', [1., 4.])
def test_churn_keeps_the_variance_of_a_gaussian(sigma_in):
    """Evaluated at sigma instead of sigma-hat, churn at this strength makes .78 of .66. The chain is linear, so its variance needs no samples: a step is
    x -> a*x + b*noise, with a and b read off two runs of it."""
    gaussian = GaussianMixture(torch.zeros(1, 1), torch.tensor([.66]), torch.ones(1))
    denoise, levels, variance = Denoise(lambda x, sigma, state: (gaussian.denoise(x, sigma, sigma_in), None), sigma_in), noise_levels(256).tolist(), 80.**2
    for sigma, sigma_next in zip(levels, levels[1:]):
        step = lambda x, noise: churn_step(denoise, State(torch.tensor([[x]], dtype=torch.float64), noise=lambda k: noise), sigma, sigma_next, gamma=.4).x.item()
        variance = variance*step(1., 0.)**2 + step(0., 1.)**2
    assert abs(sigma_in*variance**.5 - .66) < .004


def test_churn_depends_on_seed_and_step_alone(model):
    together = sample(model, CAPTIONS[:3], [4, 5, 6], steps=4, solver='churn')
    assert torch.equal(sample(model, CAPTIONS[2:3], [6], steps=4, solver='churn'), together[2:])
    assert not torch.equal(sample(model, CAPTIONS[:3], [4, 5, 6], steps=4), together)
    assert not torch.equal(seeded_noise([4], (3,), 0), seeded_noise([4], (3,), 1)) and not torch.equal(seeded_noise([4], (3,), 0), seeded_noise([4], (3,)))


def test_state_is_float64_whatever_the_network(model):
    dtypes = set()
    denoise = Denoise(lambda x, sigma, state: (dtypes.add(x.dtype), (x.bfloat16(), None))[1], 1.)
    assert solve(denoise, torch.ones(1, 1), noise_levels(3)).dtype == torch.float64 and dtypes == {torch.float64}


def test_equals_edm_at_the_effective_noise():
    "x/sigma_in + sigma*noise is EDM's process at sigma_in*sigma, seen through a glass that shrinks by sigma_in."
    x, levels = 80*seeded_noise(range(9), (1,)), noise_levels(40)
    scaled = 4*solve(mixture_denoise(4.), x, levels)
    edm = solve(mixture_denoise(1.), 4*x, 4*levels)
    torch.testing.assert_close(scaled, edm, atol=1e-12, rtol=0)


def edm_reference(D, x, levels, second_order):
    "EDM's deterministic sampler once more, from its formulas, in numpy."
    for t, t_next in zip(levels, levels[1:]):
        d = (x - D(x, t))/t
        ahead = x + (t_next - t)*d
        if second_order and t_next > 0: ahead = x + (t_next - t)*(d + (ahead - D(ahead, t_next))/t_next)/2
        x = ahead
    return x


@pytest.mark.parametrize('name', ['heun', 'euler'])
def test_equals_an_independent_edm_sampler_at_input_scale_one(name):
    x, i = 80*seeded_noise(range(9), (1,)), np.arange(18)
    levels = np.append((80**(1/7) + i/17*(.002**(1/7) - 80**(1/7)))**7, 0)
    reference = edm_reference(lambda x, t: MIXTURE.denoise(torch.from_numpy(x), t).numpy(), x.numpy(), levels, name == 'heun')
    ours = solve(mixture_denoise(1.), x, noise_levels(18), SOLVERS[name])
    np.testing.assert_allclose(ours.numpy(), reference, atol=1e-11, rtol=0)


def test_equals_the_edm_scheduler_of_diffusers():
    "Euler at sigma_in = 1; that scheduler computes in float32."
    diffusers = pytest.importorskip('diffusers', reason='diffusers is not installed: the comparison with its EDMEulerScheduler is optional')
    scheduler = diffusers.EDMEulerScheduler(sigma_min=.002, sigma_max=80., sigma_data=.5, rho=7.)
    scheduler.set_timesteps(32)
    start = seeded_noise(range(64), (1,))
    x = start.float()*scheduler.sigmas[0]
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        scheduler.scale_model_input(x, t)
        c_skip, c_out = .25/(sigma**2 + .25), sigma*.5/(sigma**2 + .25).sqrt()
        F = (MIXTURE.denoise(x.double(), sigma.double()) - c_skip*x)/c_out
        x = scheduler.step(F.float(), t, x).prev_sample
    ours = solve(mixture_denoise(1.), 80*start, noise_levels(32), euler_step)
    difference = (ours - x).abs().max().item()
    print(f'largest difference from EDMEulerScheduler: {difference:.1e}')
    assert difference < 1e-5


# Callback

def test_callback_sees_every_step(model):
    seen = []
    clip = sample(model, CAPTIONS[:2], steps=3, guidance=1., callback=lambda *args: seen.append(args))
    steps, sigmas, xs, estimates, latents = zip(*seen)
    assert steps == (0, 1, 2) and list(sigmas) == noise_levels(3).tolist()[:-1]
    assert torch.equal(xs[0], 80*seeded_noise([0, 1], model.shape))
    for x, denoised, kept in zip(xs, estimates, latents):
        assert x.shape == denoised.shape == clip.shape and x.dtype == torch.float64 and kept.shape[:2] == (2, 2)
    torch.testing.assert_close(clip, estimates[-1].clamp(-1, 1), atol=1e-5, rtol=0)


def test_callback_estimate_belongs_to_its_x():
    seen = []
    solve(mixture_denoise(4.), 80*seeded_noise([0], (1,)), noise_levels(6), heun_step, lambda *args: seen.append(args))
    for _, sigma, x, denoised, latents in seen:
        torch.testing.assert_close(denoised, MIXTURE.denoise(x, sigma, 4.), atol=1e-14, rtol=0)
        assert latents is None


def test_latents_pass_from_each_evaluation_to_the_next():
    given = []
    def denoiser(x, sigma, state):
        given.append(state.latents)
        return x*0, len(given)
    solve(Denoise(denoiser, 1.), torch.ones(1, 1), noise_levels(3), heun_step)
    assert given == [None, 1, 2, 3, 4]


def test_trajectory_is_what_the_callback_saw(model):
    seen = []
    videos, path = sample(model, CAPTIONS[:2], steps=3, guidance=1., callback=lambda *args: seen.append(args), trajectory=True)
    assert len(path) == 3 and path.sigma == [args[1] for args in seen] and torch.equal(videos, sample(model, CAPTIONS[:2], steps=3, guidance=1.))
    for k, (_, _, x, denoised, latents) in enumerate(seen):
        assert torch.equal(path.x[k], x.float()) and torch.equal(path.denoised[k], denoised) and torch.equal(path.latents[k], latents)


def test_a_trajectory_may_listen_to_the_loop_itself():
    "An empty one has length 0, and must not pass for no callback at all."
    path = Trajectory()
    solve(mixture_denoise(4.), torch.ones(2, 1), noise_levels(3), callback=path)
    assert len(path) == 3 and path.latents == [None]*3


def test_what_the_model_says_may_be_changed_on_the_way(model):
    def silenced(denoiser): return lambda x, sigma, state: (0*denoiser(x, sigma, state)[0], None)
    assert sample(model, CAPTIONS[:1], steps=2, around=silenced).abs().max() < 1e-9


# What a user can get wrong

@pytest.mark.parametrize('wrong, words', [
    (dict(steps=0), 'at least 1 step, not 0'), (dict(steps=-3), 'not -3'), (dict(prompts=[]), 'at least one caption'),
    (dict(prompts='a snail'), "got 'a snail'"), (dict(seeds=[1, 2]), '1 captions and 2 seeds'), (dict(solver='rk4'), "unknown solver 'rk4'; there are: heun, euler"),
    (dict(sigma_min=2., sigma_max=1.), 'sigma_min <= sigma_max'), (dict(sigma_min=0.), '0 < sigma_min'), (dict(rho=0.), 'rho > 0'), (dict(micro_batch=0), 'at least 1 clip'),
    (dict(fps=[8., 8.]), 'each of the 1 clips'), (dict(size=[[9, 16], [9, 16]]), 'each of the 1 clips'),
    (dict(low_res=torch.zeros(1, 3, 4, 9, 16)), 'only an upsampler'), (dict(guidance=math.nan), 'finite number'), (dict(sigma_max=math.inf), 'sigma_max'),
    (dict(steps=2.5), 'whole number of steps, not 2.5'), (dict(steps='8'), "not '8'"), (dict(sigma_min=2., sigma_max=2., solver='dpm++'), '64 noise levels cannot fall'),
    (dict(rho=1e-3), 'with rho 0.001'), (dict(rho=1e18), 'cannot fall'), (dict(guidance=None), 'finite number, not None'), (dict(guidance='2'), "finite number, not '2'"),
    (dict(guidance=Guidance), 'finite number'), (dict(solver=None), 'unknown solver None'), (dict(solver=['heun']), 'unknown solver'), (dict(solver=2), 'unknown solver 2'),
    (dict(seeds=[1.5]), 'whole numbers, not 1.5'), (dict(seeds=['1']), "not '1'")], ids=str)
def test_a_mistake_is_named(model, wrong, words):
    with pytest.raises(ValueError) as error: sample(model, **dict(prompts=CAPTIONS[:1]) | wrong)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_divergence_is_named():
    def denoiser(x, sigma, state): return x*torch.tensor([[1.], [float('nan') if sigma < 1 else 1.], [1.]]), None
    levels = noise_levels(8)
    bad = next(i for i, sigma in enumerate(levels) if sigma < 1)
    with pytest.raises(FloatingPointError, match=rf'diverged at step {bad} \(sigma = {levels[bad]:.4g}\) in samples \[1\]'):
        solve(Denoise(denoiser, 1.), torch.ones(3, 1), levels, euler_step)


def test_noise_levels():
    levels = noise_levels(18)
    assert len(levels) == 19 and levels.dtype == torch.float64 and levels[-1] == 0 and (levels.diff() < 0).all()
    torch.testing.assert_close(levels[[0, -2]], torch.tensor([80., .002], dtype=torch.float64), rtol=1e-12, atol=0)
    steps = (levels[:-1]**(1/7)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(17), rtol=1e-10, atol=0)
    assert noise_levels(1).tolist() == pytest.approx([80., 0.])
    torch.testing.assert_close(noise_levels(9, rho=math.inf)[:-1].log().diff(), torch.full((8,), math.log(.002/80)/8, dtype=torch.float64))
    assert noise_levels(3, 1., 27., rho=3.).tolist() == pytest.approx([27., 8., 1., 0.])
    assert noise_levels(1, 2., 2.).tolist() == pytest.approx([2., 0.]) and noise_levels(np.int64(2)).tolist() == pytest.approx([80., .002, 0.])
    assert (noise_levels(9, rho=.01).diff() < 0).all()


def test_a_level_that_comes_twice_is_no_memory():
    levels, x = torch.tensor([2., 2., 1., 0.], dtype=torch.float64), torch.ones(1, 1)
    torch.testing.assert_close(solve(mixture_denoise(1.), x, levels, dpm_step), solve(mixture_denoise(1.), x, levels[1:], dpm_step), atol=1e-14, rtol=0)


def test_seeded_noise():
    noise = seeded_noise([3, 7, 3], (2, 5))
    assert noise.dtype == torch.float64 and torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1:2], seeded_noise(np.array([7]), (2, 5)))
    assert torch.equal(noise[1], torch.randn((2, 5), generator=torch.Generator().manual_seed(7), dtype=torch.float64))
    many = seeded_noise(range(2000), (50,))
    assert abs(many.mean()) < .01 and abs(many.std() - 1) < .01 and abs((many[:, 0]*many[:, 1]).mean()) < .1


def test_no_two_pairs_of_seed_and_step_share_noise():
    "Seeds and steps that share their low 32 bits, or whose digits run into each other, negative ones included."
    numbers = [0, 1, 2, 7, 2**32, 2**32 + 1, 2**32 + 7, 2**63 - 1, 2**63, 2**64 - 1]
    pairs = [(seed, step) for seed in numbers for step in (None, -2**32, -2, -1, *numbers[:8])]
    assert len({tuple(seeded_noise([seed], (4,), step)[0].tolist()) for seed, step in pairs}) == len(pairs)


@pytest.mark.parametrize('step', [None, -1, 0, 2**40])
@pytest.mark.parametrize('seed', [0, 2**32 - 1, 2**32, 2**64 - 1])
def test_seeds_count_modulo_two_to_the_64(seed, step):
    noise = seeded_noise([seed, seed - 2**64, seed + 2**64, seed + 2**200], (3, 2), step)
    assert noise.shape == (4, 3, 2) and noise.dtype == torch.float64 and (noise == noise[:1]).all()


@pytest.mark.parametrize('seeds, step', [(range(2**40, 2**40 + 500), None), (range(500), 0), (range(-500, 0), -1)])
def test_neighbouring_streams_are_independent_and_normal(seeds, step):
    noise = seeded_noise(seeds, (200,), step)
    assert abs(noise.mean()) < .015 and abs(noise.std() - 1) < .01 and abs((noise[1:]*noise[:-1]).mean()) < .015 and abs((noise**4).mean() - 3) < .1


@pytest.mark.parametrize('solver', ['heun', 'churn'])
def test_ranks_that_share_captions_make_the_clips_of_one(model, solver):
    seeds = [3, -1, 2**32 + 3, 2**64 + 5]
    together = sample(model, CAPTIONS[:4], seeds, steps=3, solver=solver)
    for rank in (0, 1): assert torch.equal(sample(model, CAPTIONS[rank:4:2], seeds[rank::2], steps=3, solver=solver), together[rank::2])
    assert not torch.equal(*(sample(model, CAPTIONS[:1], [seed], steps=2, solver=solver) for seed in (3, 2**32 + 3)))


# The bench

def test_a_cut_bench_goes_on_where_it_was(model, tmp_path):
    "And refuses a record of other weights or settings."
    model.save_pretrained(tmp_path/'tiny')
    said = []
    bench = lambda **options: bench_sampling.Bench(tmp_path/'tiny', tmp_path/'records', say=said.append, **options)
    rows = bench().solvers(clips=2, steps=4, budgets=(2,))
    assert len(said) == len(rows) == 9 and all(row['evaluations'] == 3 and len(row['each']) == 2 for row in rows.values())
    assert rows['heun, rho 7, 3']['rms'] != rows['heun, rho 7, withheld, 3']['rms'] > 0
    told = json.loads((tmp_path/'records/solvers.json').read_text())
    del told['rows']['dpm++, log, 3']
    (tmp_path/'records/solvers.json').write_text(json.dumps(told))
    again = bench().solvers(clips=2, steps=4, budgets=(2,))
    assert len(said) == 10 and again['dpm++, log, 3']['each'] == rows['dpm++, log, 3']['each']
    with pytest.raises(ValueError, match='another clips; --force'): bench().solvers(clips=1, steps=4, budgets=(2,))
    with torch.no_grad(): model.network.gate.weight.mul_(.5)
    model.save_pretrained(tmp_path/'tiny', force=True)
    with torch.no_grad(): model.network.gate.weight.mul_(2)
    with pytest.raises(ValueError, match='another weights; --force'): bench().solvers(clips=2, steps=4, budgets=(2,))
    assert len(bench(force=True).solvers(clips=1, steps=2, budgets=(1,))) == 9


def test_the_sampler_is_timed_around_its_network(model, tmp_path):
    model.save_pretrained(tmp_path/'tiny')
    rows = bench_sampling.Bench(tmp_path/'tiny', tmp_path/'records', say=lambda line: None).overhead(clips=1, steps=2, rounds=1)
    assert len(rows) == 4 and all(row['own'] >= 1 and row['ratio'] > 0 and row['bare_ms'] > 0 for row in rows.values())

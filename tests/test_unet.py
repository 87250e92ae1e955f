"The U-Net: its contract at many shapes, what its layers see, the paper's sizes, and that samplers, training and files take it like any other network."
import json, math
from dataclasses import replace

import pytest, torch
from torch import nn

from snapvideo_nb.blocks import Conditions
from snapvideo_nb.model import PRESETS, ModelConfig, SnapVideo
from snapvideo_nb.sampling import sample
from snapvideo_nb.text import train_tokenizer
from snapvideo_nb.training import TrainConfig, previous_latents, training_loss
from snapvideo_nb.unet import FrameAttention, ResidualBlock, SpaceTimeAttention, UNet, UNetConfig, frame_waves, as_pictures
from snapvideo_nb.data import Shapes
from snapvideo_nb.video import collate

CAPTIONS = ['a red disc moves left', 'a blue square stays still', 'a ring grows on a white background']
SMALL = UNetConfig(frames=4, height=10, width=16, base=8, multipliers=(1, 2, 3), res_blocks=1, attention=(8, 4), head=8, condition_width=16, text_width=12, groups=4, dropout=0.)


def conditions(n: int, c: UNetConfig = SMALL, tokens: int = 5) -> Conditions:
    mask = torch.arange(tokens) < torch.arange(1, n + 1).clamp(max=tokens)[:, None]
    low = dict(low_res=torch.randn(n, 3, c.frames, c.height, c.width), low_res_level=torch.rand(n)) if c.low_res else {}
    return Conditions(torch.randn(n, tokens, c.text_width)*mask[..., None], mask, torch.tensor([24., 8., math.inf])[torch.arange(n) % 3], torch.full((n, 2), 36.), **low)


def stirred(c: UNetConfig = SMALL) -> UNet:
    "A network without zeros, as training leaves it."
    torch.manual_seed(0)
    network = UNet(c).eval()
    for p in network.parameters():
        if not p.any(): nn.init.normal_(p, 0, .2 if p.ndim == 1 else p[0].numel()**-.5)
    return network


def clips(n: int, c: UNetConfig = SMALL): return torch.randn(n, 3, c.frames, c.height, c.width)


@pytest.fixture(scope='module')
def model():
    "A small U-Net with a text encoder, as a model like any other, its zeros filled."
    torch.manual_seed(0)
    text = dict(kind='small', width=12, layers=1, heads=2, length=8, vocab_size=300)
    model = SnapVideo(ModelConfig(SMALL, text, fps=8.), train_tokenizer(CAPTIONS, 300).to_json()).eval()
    model.network.load_state_dict(stirred().state_dict())
    return model


# The contract

@pytest.mark.parametrize('low_res', [False, True])
@pytest.mark.parametrize('height, width', [(8, 16), (10, 16), (9, 13), (11, 16)])
def test_every_size_goes_in_and_comes_out(height, width, low_res):
    c = replace(SMALL, height=height, width=width, low_res=low_res)
    network, x, told = stirred(c), clips(3, c), conditions(3, c)
    out, latents = network(x, torch.zeros(3), told)
    assert out.shape == x.shape and out.isfinite().all() and out.std() > .01 and latents is None and not network.self_conditioned
    torch.testing.assert_close(network(x, torch.zeros(3), replace(told, prepared=network.prepare(told)))[0], out, rtol=0, atol=0)


def test_padding_is_even_and_as_small_as_can_be():
    for height in range(1, 40):
        c = UNetConfig(height=height)
        left, right, above, below = c.pads
        assert c.padded[1] % 8 == 0 and 0 <= c.padded[1] - height < 8 and above + below == c.padded[1] - height and 0 <= below - above <= 1 and left == right == 0


def test_a_fresh_network_is_silent_and_its_blocks_are_their_skips():
    network = UNet(SMALL)
    assert network(clips(2), torch.zeros(2), conditions(2))[0].eq(0).all()
    x, told = torch.randn(8, 8, 6, 8), torch.randn(2, 16)
    assert ResidualBlock(8, 8, SMALL)(x, told).equal(x)
    assert ResidualBlock(8, 8, SMALL, 'up')(ResidualBlock(8, 8, SMALL, 'down')(x, told), told).shape == x.shape
    attention = SpaceTimeAttention(16, SMALL)
    x, kv = torch.randn(8, 16, 3, 5), attention.text.keys_values(torch.randn(2, 5, 16))
    assert attention(x, kv, torch.ones(2, 5, dtype=torch.bool)).equal(x)


def test_samples_do_not_see_each_other():
    network, x, told = stirred(), clips(3), conditions(3)
    together = network(x, torch.tensor([-1., 0, 1]), told)[0]
    for i in range(3):
        torch.testing.assert_close(network(x[i:i+1], torch.tensor([i - 1.]), told[i:i+1])[0], together[i:i+1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('low_res', [False, True])
def test_everything_it_is_told_matters_and_padding_words_do_not(low_res):
    c = replace(SMALL, low_res=low_res)
    network, x, told, zero = stirred(c), clips(2, c), conditions(2, c), torch.zeros(2)
    out = network(x, zero, told)[0]
    differs = lambda c_noise=zero, **change: (network(x, c_noise, replace(told, **change))[0] - out).abs().max() > 1e-4
    assert differs(c_noise=zero + .3) and differs(fps=told.fps/3) and differs(size=told.size*9) and differs(text=told.text + torch.randn_like(told.text))
    if low_res: assert differs(low_res=told.low_res + 1) and differs(low_res_level=told.low_res_level + 1)
    assert network(x, zero, replace(told, text=told.text.masked_fill(~told.text_mask[..., None], 1e4)))[0].equal(out)
    assert not network(x, zero, told.without_text())[0].equal(out)


# What the layers see

def test_without_time_layers_frames_are_independent():
    network, x, told, order = stirred(), clips(2), conditions(2), [3, 0, 2, 1]
    whole = network(x, torch.zeros(2), told)[0]
    other = x.clone()
    other[:, :, 1] += 1
    assert ((network(other, torch.zeros(2), told)[0] - whole).abs().amax((0, 1, 3, 4)) > 1e-4).all()
    for step in network.steps:
        if step.attention: nn.init.zeros_(step.attention.time.attention.out.weight)
    pile = network(x, torch.zeros(2), told)[0]
    assert network(other, torch.zeros(2), told)[0][:, :, [0, 2, 3]].equal(pile[:, :, [0, 2, 3]])
    torch.testing.assert_close(network(x[:, :, order], torch.zeros(2), told)[0], pile[:, :, order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('frames', [1, 2, 7, 16])
def test_time_knows_its_order_by_position_only(frames):
    torch.testing.assert_close(frame_waves(frames, 32).square().mean(1), torch.ones(frames))
    layer, x, order = FrameAttention(32, frames, 16), torch.randn(5, frames, 32), torch.randperm(frames)
    nn.init.zeros_(layer.position)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_everything_learns():
    network = stirred(replace(SMALL, low_res=True))
    network(clips(2), torch.tensor([-.5, .5]), conditions(2, network.config))[0].sub(1).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize('change, message', [(dict(attention=(32,)), 'no level of this U-Net is 32 pixels wide; its levels are 16, 8, 4'),
                                             (dict(groups=3), '8 channels cannot be split into 3 groups'), (dict(head=7), 'cannot be split into heads of 7')])
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message), torch.device('meta'): UNet(replace(SMALL, **change))


# Precision and compilation

def test_bf16_is_close_by_autocast_and_in_the_weights():
    network, x, told = stirred(), clips(2), conditions(2)
    with torch.no_grad():
        exact = network(x, torch.zeros(2), told)[0]
        with torch.autocast('cpu', torch.bfloat16): half = network(x, torch.zeros(2), told)[0]
        low = told.map(lambda t: t.bfloat16() if t.is_floating_point() else t)
        whole = network.bfloat16()(x.bfloat16(), torch.zeros(2).bfloat16(), low)[0]
    assert whole.dtype == torch.bfloat16
    for rough in (half, whole): assert (rough.float() - exact).square().mean().sqrt() < .05*exact.square().mean().sqrt()


def test_the_layout_of_pictures_and_weights_changes_nothing():
    network, x, told = stirred(), clips(2), conditions(2)
    assert as_pictures(torch.randn(2, 4, 6, 3)).is_contiguous()  # on a CPU channels come first
    out = network(x, torch.zeros(2), told)[0]
    torch.testing.assert_close(network.to(memory_format=torch.channels_last)(x, torch.zeros(2), told)[0], out, atol=1e-5, rtol=1e-4)


def test_it_is_one_graph():
    network, x, told = stirred(), clips(2), conditions(2)
    graph = torch.compile(network, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(graph(x, torch.zeros(2), told)[0], network(x, torch.zeros(2), told)[0], atol=1e-5, rtol=1e-4)
    prepared = replace(told, prepared=network.prepare(told))
    torch.testing.assert_close(graph(x, torch.zeros(2), prepared)[0], network(x, torch.zeros(2), told)[0], atol=1e-5, rtol=1e-4)


# The model around it

@pytest.mark.parametrize('name, millions, share', [('unet-284m', 284, .03), ('unet-85m', 85, .07)])
def test_the_papers_sizes(name, millions, share):
    assert abs(sum(p.numel() for p in SnapVideo.from_preset(name, 'meta').parameters())/1e6/millions - 1) < share


def test_the_small_preset_is_as_large_as_mini():
    unet, mini = (sum(p.numel() for p in SnapVideo.from_preset(name, 'meta').parameters()) for name in ('unet-mini', 'mini'))
    assert .9*mini < unet < 5.4e6 and PRESETS['unet-mini'].framework == PRESETS['mini'].framework and PRESETS['unet-mini'].text == PRESETS['mini'].text


def test_a_config_survives_json():
    for config in (PRESETS['unet-85m'], ModelConfig(SMALL)): assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_saving_is_exact(model, tmp_path):
    loaded = SnapVideo.from_pretrained(model.save_pretrained(tmp_path/'saved'))
    assert loaded.config == model.config and all(a.equal(b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    noisy, told = torch.randn(2, *model.shape), model.conditions(CAPTIONS[:2])
    denoised, latents = model(noisy, 1., told)
    assert loaded(noisy, 1., loaded.conditions(CAPTIONS[:2]))[0].equal(denoised) and latents is None


@pytest.mark.parametrize('guidance', [0., 2.])
def test_a_clip_has_the_same_bits_in_any_company(model, guidance):
    together = sample(model, CAPTIONS, [5, 6, 7], steps=3, guidance=guidance)
    assert together.isfinite().all() and not together[0].equal(together[1])
    for rows in ([1], [2, 0]):
        assert sample(model, [CAPTIONS[i] for i in rows], [5 + i for i in rows], steps=3, guidance=guidance).equal(together[rows])


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_step_of_training(model, precision):
    "One step from a fresh network lowers the loss of its own batch; no extra evaluation is paid for."
    config = TrainConfig(preset='unet-mini', batch=4, precision=precision, weight='unit', label_dropout=.5)
    batch = collate([Shapes(4, 10, 16)[j] for j in range(4)])
    fresh = SnapVideo(model.config, model.text.tokenizer_json)
    assert previous_latents(fresh, batch.video, torch.ones(4), None, torch.ones(4, dtype=torch.bool)) is None
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = training_loss(fresh, batch, config, 0)[0].mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0] and all(p.isfinite().all() for p in fresh.parameters())


def test_the_small_preset_trains_and_samples_by_its_name(tmp_path):
    from snapvideo_nb.training import recipe, train
    folder = tmp_path/'run'
    train(recipe('unet-mini', run=str(folder), data='shapes', data_options={}, steps=1, batch=1, warmup=1, workers=0, sample_every=0, checkpoint_every=1))
    model = SnapVideo.from_pretrained(folder/'model')
    assert model.config == PRESETS['unet-mini'] and sample(model, CAPTIONS[:1], steps=1).shape == (1, 3, 16, 18, 32)

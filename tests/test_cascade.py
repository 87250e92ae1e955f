"The upsampler: what it is told, how it begins, trains and resumes, and two stages in a row."
from dataclasses import replace
import pytest, torch

from snapvideo_nb import fit, training
from snapvideo_nb.cascade import Cascade, second_seed, upsample, upsampler_folder
from snapvideo_nb.cli import main
from snapvideo_nb.data import Shapes
from snapvideo_nb.model import PRESETS, SnapVideo
from snapvideo_nb.sampling import sample
from snapvideo_nb.text import train_tokenizer
from snapvideo_nb.training import TrainConfig, Trainer, Alone, low_res_chances, take_step, train, training_loss
from snapvideo_nb.upsampling import begin_with, enlarge, low_res_input, low_res_task, shrink
from snapvideo_nb.video import collate

CAPTIONS = ['a red disc moves left on a blue background', 'a blue ring moves right on a green background', 'a green cross moves up on a red background']
TINY = PRESETS['tiny']
TINY_UP = replace(TINY, network=replace(TINY.network, height=18, width=32, low_res=True, finish=8), low_res=(9, 16), level=.2)


@pytest.fixture
def pair(monkeypatch):
    "A first stage and its upsampler, untrained; the presets know the second one's sizes."
    monkeypatch.setitem(PRESETS, 'tiny-up', TINY_UP)
    torch.manual_seed(0)
    base, up = (SnapVideo(config, train_tokenizer(CAPTIONS, 300).to_json()).eval() for config in (TINY, TINY_UP))
    begin_with(up, base)
    with torch.no_grad(): up.network.stem[0].weight[:, 36:].normal_(0, .1)
    return base, up


def test_noise_level_decides_how_much_of_the_small_clip_is_left(pair):
    clip, noise = torch.randn(2, 3, 4, 9, 16), torch.randn(2, 3, 4, 9, 16)
    seen = low_res_input(TINY_UP, clip, torch.tensor([0., 1.]), noise)
    torch.testing.assert_close(seen, low_res_input(TINY_UP, torch.stack([clip[0], (clip[1] + noise[1])/2**.5]), 0., noise))


def test_a_second_stage_has_the_same_bits_in_any_company(pair):
    base, up = pair
    clips = sample(base, CAPTIONS, [4, 5, 6], steps=2)
    large = upsample(up, CAPTIONS, clips, [4, 5, 6], steps=2)
    assert torch.equal(upsample(up, CAPTIONS[1:2], clips[1:2], [5], steps=2), large[1:2])
    assert torch.equal(Cascade(base, up).sample(CAPTIONS, [4, 5, 6], steps=2, up_steps=2), large)
    assert second_seed(5) != 5 and second_seed(5) != second_seed(6)


def test_an_upsampler_trains_resumes_and_ends_with_the_same_bits(pair, tmp_path):
    base, _ = pair
    base.save_pretrained(tmp_path/'tiny')
    config = TrainConfig(run=str(tmp_path/'whole'), preset='tiny-up', first_stage=str(tmp_path/'tiny'), data='shapes', steps=6, batch=4, workers=0, warmup=2, precision='fp32',
                         sample_every=6, checkpoint_every=3, log_every=3, fused_attention=False)
    train(config)
    train(replace(config, run=str(tmp_path/'half'), steps=3)), train(replace(config, run=str(tmp_path/'half')))
    whole, half = ((tmp_path/name/'model/model.safetensors').read_bytes() for name in ('whole', 'half'))
    trained = SnapVideo.from_pretrained(tmp_path/'whole/model')
    assert trained.config == TINY_UP and trained.text.tokenizer_json == base.text.tokenizer_json
    assert (tmp_path/'whole/samples/step-00000006.png').exists()
    assert not torch.equal(trained.network.blocks[0].read.q.weight, base.network.blocks[0].read.q.weight)
    assert upsample(trained, CAPTIONS[:1], sample(base, CAPTIONS[:1], steps=1), steps=1).isfinite().all()


def test_levels_and_noise_belong_to_clips_and_reach_the_loss(pair):
    _, up = pair
    config, batch = TrainConfig(preset='tiny-up', batch=4, precision='fp32', label_dropout=0.), collate([Shapes(4, 18, 32)[i] for i in range(4)])
    level, noise = low_res_chances(config, range(4), TINY_UP)
    assert noise.shape == (4, 3, 4, 9, 16) and 0 <= level.min() and level.max() <= config.max_level
    assert torch.equal(low_res_chances(config, [2], TINY_UP)[1][0], noise[2])
    with torch.no_grad():
        usual, without = (training_loss(up, batch, replace(config, max_level=top), 0)[0] for top in (.5, 0.))
        parts = torch.cat([training_loss(up, batch[rows.start:rows.stop], config, 0, rows)[0] for rows in (range(2), range(2, 4))])
    assert (usual != without).all()
    torch.testing.assert_close(parts, usual, atol=1e-5, rtol=1e-5)


def test_an_upsampler_with_a_remainder_trains_and_samples_what_the_enlarged_clip_lacks(pair):
    "The loss is the ordinary one of (clip - enlarged)/spread, and a silent network draws noise of about the spread around the enlarged clip."
    _, up = pair
    config, batch = TrainConfig(preset='tiny-up', batch=4, precision='fp32', label_dropout=0., self_conditioning=0.), collate([Shapes(4, 18, 32)[i] for i in range(4)])
    plain = training_loss(up, batch, config, 0)[0]
    up.config = replace(up.config, remainder=.2)
    level, noise = low_res_chances(config, range(4), TINY_UP)
    told = low_res_task(TINY_UP, batch.video, level, noise)
    guess, spread = told['low_res']*(1 + level.view(-1, 1, 1, 1, 1)**2)**.5, (.04 + .73*level.view(-1, 1, 1, 1, 1)**2)**.5
    sigma, chance, *_ = training.chances(config, range(4), batch.video.shape[1:])
    with torch.no_grad():
        loss = training.diffusion_loss(up.framework, up.network, (batch.video - guess)/spread, chance, sigma, up.conditions(batch.captions, batch.fps, batch.size, **told))[0]
        found = training_loss(up, batch, config, 0)[0]
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-5)
    assert (found != plain).all()
    for weight in [*up.network.head[1].parameters(), *up.network.finish.parameters()]: torch.nn.init.zeros_(weight)
    small = shrink(batch.video, 9, 16)
    assert 0 < (upsample(up, CAPTIONS[:1], small[:1], steps=16, level=0.) - enlarge(small[:1], 18, 32)).square().mean().sqrt() < .25  # about the spread of .2


def test_a_stem_fits_patches_of_another_size_and_blocks_must_agree(pair):
    "With twice the patch on a clip of twice the size, an upsampler reads an enlarged clip as the first stage reads the small one, pixel for pixel."
    base, up = pair
    config = replace(TINY_UP, network=replace(TINY_UP.network, patch=(1, 6, 8), group=(4, 3, 2)))
    other = SnapVideo(config, base.text.tokenizer_json)
    assert 'network.stem.0.weight' not in begin_with(other, base) and not other.network.gate.weight.any()
    clip = torch.randn(1, 3, 4, 9, 16)
    large = torch.cat([clip.repeat_interleave(2, 3).repeat_interleave(2, 4), torch.randn(1, 3, 4, 18, 32)], 1)
    mine = other.network.stem(fit.patchify(large, (1, 6, 8), (4, 3, 2)))
    theirs = base.network.stem(fit.patchify(clip, (1, 3, 4), (4, 3, 2)))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    deeper = SnapVideo(replace(TINY, network=replace(TINY.network, blocks=2)), base.text.tokenizer_json)
    for pairing in ((up, deeper), (SnapVideo(replace(TINY_UP, network=replace(TINY_UP.network, blocks=2)), base.text.tokenizer_json), base)):
        with pytest.raises(ValueError, match='do not fit this upsampler'): begin_with(*pairing)


def test_what_is_told_reaches_both_stages(pair):
    cascade, told = Cascade(*pair), dict(steps=1, up_steps=1, guidance=1., up_guidance=1.)
    plain = cascade.sample(CAPTIONS[:1], **told)
    assert all(not torch.equal(cascade.sample(CAPTIONS[:1], **told, **more), plain) for more in (dict(negative='a red disc'), dict(fps=24.), dict(size=(90, 160))))


def test_the_gradient_finds_the_small_clip():
    "A few steps on one batch: an upsampler that begins blind to the small clip learns to use it."
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 300).to_json()
    up = SnapVideo(TINY_UP, tokenizer)
    begin_with(up, SnapVideo(TINY, tokenizer))
    config, batch = TrainConfig(preset='tiny-up', batch=8, precision='fp32', fused_attention=False), collate([Shapes(4, 18, 32)[i] for i in range(8)])
    training_loss(up, batch, config, 0)[0].mean().backward()
    assert up.network.stem[0].weight.grad[:, 36:].abs().sum() > 0 and up.network.conditions.level.mlp[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize('what, words', [
    (lambda base, up, folder: Cascade(up), 'is an upsampler'),
    (lambda base, up, folder: Cascade(SnapVideo.from_preset('mini', 'meta'), up), 'does not enlarge clips of 16x18x32'),
    (lambda base, up, folder: upsample(base, CAPTIONS[:1], torch.zeros(1, *base.shape)), 'no upsampler'),
    (lambda base, up, folder: upsample(up, CAPTIONS[:1], torch.zeros(1, *up.shape), steps=1), 'clips of 4x9x16, not 4x18x32'),
    (lambda base, up, folder: upsample(up, CAPTIONS, torch.zeros(1, *base.shape)), '3 and 1'),
    (lambda base, up, folder: upsample(up, [], torch.zeros(0, *base.shape)), 'at least one'),
    (lambda base, up, folder: upsample(up, CAPTIONS[:1], torch.zeros(1, *base.shape), level=float('nan')), 'at least 0'),
    (lambda base, up, folder: Cascade(base, up).sample(CAPTIONS[:1], trajectory=True), 'one stage'),
    (lambda base, up, folder: up.conditions(CAPTIONS[:1]), 'needs a low-resolution clip'),
    (lambda base, up, folder: replace(TINY, low_res=(9, 16)), 'an upsampler, and nothing else'),
    (lambda base, up, folder: TrainConfig(max_level=-1.), 'at least 0')])
def test_mistakes_are_named(pair, tmp_path, what, words):
    with pytest.raises(ValueError) as error: what(*pair, tmp_path)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_the_upsampler_lies_beside_its_model(pair, tmp_path):
    base, up = pair
    base.save_pretrained(tmp_path/'tiny')
    assert upsampler_folder(tmp_path/'tiny') is None and Cascade.from_pretrained(tmp_path/'tiny').up is None
    up.save_pretrained(tmp_path/'tiny-up')
    assert upsampler_folder(tmp_path/'tiny') == tmp_path/'tiny-up' and upsampler_folder(tmp_path/'tiny', 'none') is None
    found = Cascade.from_pretrained(tmp_path/'tiny')
    assert torch.equal(found.sample(CAPTIONS[:1], steps=1, up_steps=1), Cascade(base, up).sample(CAPTIONS[:1], steps=1, up_steps=1))
    with pytest.raises(FileNotFoundError): upsampler_folder(tmp_path/'tiny', 'nowhere')


def test_the_papers_upsampler_on_no_memory():
    giant = SnapVideo.from_preset('fit-3.9b-up', 'meta')
    assert giant.framework.sigma_in == 32 and giant.config.low_res == (36, 64) and giant.network.position.numel() == 147_456*1024

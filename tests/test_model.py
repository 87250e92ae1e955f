"""What the notebooks on blocks, FIT and the model cannot hold: many shapes at once, damaged files, half-finished writes, an upload, frozen encoders."""
import copy, json, math, pickle, shutil
from dataclasses import replace

import pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from snapvideo_nb import model as model_module
from snapvideo_nb.blocks import Attention, Conditions, FourierToken, SelfAttentionLayer
from snapvideo_nb.fit import FIT, FITConfig, pad_crop, patchify, sinusoids, unpatchify
from snapvideo_nb.model import PRESETS, ModelConfig, SnapVideo, weights_folder, whole_folder
from snapvideo_nb.text import train_tokenizer

CAPTIONS = ['a red apple moves left', 'a snail stays still', 'a rocket moves up on a blue background']
TOKENIZER = train_tokenizer(CAPTIONS, 300).to_json()
SMALL = FITConfig(frames=4, height=10, width=16, patch=(1, 3, 4), group=(4, 2, 2), patch_width=32, latents=8, latent_width=48, blocks=2, global_layers=1,
                  local_layers=1, patch_head=8, latent_head=16, condition_width=24, text_width=20, dropout=.1)


def conditions(n: int, c: FITConfig = SMALL, tokens: int = 5) -> Conditions:
    mask = torch.arange(tokens) < torch.arange(1, n + 1).clamp(max=tokens)[:, None]
    low = dict(low_res=torch.randn(n, 3, c.frames, c.height, c.width), low_res_level=torch.rand(n)) if c.low_res else {}
    return Conditions(torch.randn(n, tokens, c.text_width)*mask[..., None], mask, torch.tensor([24., 8., math.inf])[torch.arange(n) % 3], torch.full((n, 2), 36.), **low)


def opened(fit: FIT) -> FIT:
    "The same network with its self-conditioning gate open, as training leaves it."
    with torch.no_grad(): fit.gate.weight.normal_(0, .5)
    return fit


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = SnapVideo.from_preset('tiny', tokenizer_json=TOKENIZER).eval()
    opened(model.network)
    return model


@pytest.fixture
def saved(model, tmp_path): return model.save_pretrained(tmp_path/'saved')


# Blocks

@pytest.mark.parametrize('dim, context_dim, head_dim', [(32, 32, 8), (32, 48, 16), (48, 32, 16), (24, 96, 24)])
@pytest.mark.parametrize('masked', [False, True])
def test_attention_is_softmax_attention(dim, context_dim, head_dim, masked):
    "Against the formula written out, also where the reader is wider than the context."
    torch.manual_seed(0)
    a, x, context = Attention(dim, context_dim, head_dim), torch.randn(3, 5, dim), torch.randn(3, 7, context_dim)
    for p in (a.norm.weight, a.norm_context.weight): nn.init.uniform_(p)
    mask = torch.arange(7) < torch.tensor([[1], [4], [7]]) if masked else None
    q = F.layer_norm(x, [dim], a.norm.weight) @ a.q.weight.T
    k, v = (F.layer_norm(context, [context_dim], a.norm_context.weight) @ a.kv.weight.T).chunk(2, -1)
    heads = []
    for q, k, v in zip(*(t.split(head_dim, -1) for t in (q, k, v))):
        scores = q @ k.mT/math.sqrt(head_dim)
        heads.append((scores if mask is None else scores.masked_fill(~mask[:, None], -math.inf)).softmax(-1) @ v)
    torch.testing.assert_close(a(x, context, mask), torch.cat(heads, -1) @ a.out.weight.T, atol=1e-5, rtol=1e-4)


def test_only_the_layers_among_latents_drop_out():
    "The paper: dropout in the feed-forward after latent self-attention and nowhere else."
    rates = {name: m.p for name, m in FIT(SMALL).named_modules() if isinstance(m, nn.Dropout)}
    assert {name for name, p in rates.items() if p} == {f'blocks.{b}.compute.0.feed_forward.3' for b in range(2)}


def test_an_image_has_a_finite_token_and_finite_gradients():
    token = FourierToken(8, 16)
    out = token(24/torch.tensor([[math.inf], [24.]]))
    out.square().sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in token.parameters())


def test_conditions_keep_the_upsamplers_input_through_every_operation():
    c = conditions(3, replace(SMALL, low_res=True))
    again = Conditions.cat([c[:2], c[2:]]).to('cpu')
    assert again.low_res.equal(c.low_res) and again.low_res_level.equal(c.low_res_level)
    assert c.without_text().low_res is c.low_res and Conditions.cat([conditions(2), conditions(1)]).low_res is None


# FIT

@pytest.mark.parametrize('size', [(1, 1, 1), (3, 35, 61), (4, 36, 64), (2, 37, 63), (5, 40, 64)])
def test_padding_and_cropping_undo_each_other_for_odd_sizes_too(size):
    video = torch.randn(2, 3, *size)
    assert pad_crop(pad_crop(video, (5, 40, 64)), size).equal(video)


@pytest.mark.parametrize('patch, group, groups', [((1, 4, 4), (4, 1, 2), (1, 3, 2)), ((2, 3, 1), (2, 2, 5), (3, 1, 2)), ((1, 1, 1), (1, 1, 1), (2, 3, 4))])
def test_patches_and_back(patch, group, groups):
    video = torch.randn(2, 3, *(p*g*n for p, g, n in zip(patch, group, groups)))
    patches = patchify(video, patch, group)
    assert patches.shape == (2, math.prod(groups), math.prod(group), 3*math.prod(patch)) and unpatchify(patches, patch, group, groups).equal(video)


@pytest.mark.parametrize('width', [6, 32, 96, 100, 192])
def test_waves_tell_all_places_apart_and_have_unit_size(width):
    waves = sinusoids((5, 4, 7), width).flatten(0, 2)
    torch.testing.assert_close(waves.square().mean(-1), torch.ones(140))
    assert torch.cdist(waves, waves).add(torch.eye(140)*9).min() > 1e-3


@pytest.mark.parametrize('low_res', [False, True])
def test_a_clip_of_odd_size_goes_in_and_comes_out(low_res):
    c = replace(SMALL, low_res=low_res)
    assert c.padded == (4, 12, 16) and c.groups == (1, 2, 2)
    out, latents = FIT(c)(torch.randn(3, 3, 4, 10, 16), torch.zeros(3), conditions(3, c))
    assert out.shape == (3, 3, 4, 10, 16) and latents.shape == (3, 8, 48)


def test_a_group_reads_its_own_patches_only():
    "With the layers among latents silenced, nothing crosses from one group to another."
    torch.manual_seed(0)
    fit = FIT(replace(SMALL, height=12, dropout=0.)).eval()
    for block in fit.blocks:
        for layer in block.compute:
            for p in (layer.attention.out.weight, layer.feed_forward[-1].weight, layer.feed_forward[-1].bias): nn.init.zeros_(p)
    x, told = torch.randn(1, 3, 4, 12, 16), conditions(1)
    changed = x.clone(); changed[..., 6:, 8:] += torch.randn(1, 3, 4, 6, 8)
    difference = (fit(changed, torch.zeros(1), told)[0] - fit(x, torch.zeros(1), told)[0]).abs().amax((0, 1, 2))
    assert difference[6:, 8:].min() > 0 and difference[:6].max() < 1e-6 and difference[:, :8].max() < 1e-6


def test_samples_do_not_see_each_other():
    torch.manual_seed(0)
    fit, x, told, previous = opened(FIT(SMALL)).eval(), torch.randn(3, 3, 4, 10, 16), conditions(3), torch.randn(3, 8, 48)
    together = fit(x, torch.tensor([-1., 0, 1]), told, previous)
    for i in range(3):
        alone = fit(x[i:i+1], torch.tensor([i - 1.]), told[i:i+1], previous[i:i+1])
        torch.testing.assert_close(alone, tuple(t[i:i+1] for t in together), atol=2e-5, rtol=1e-4)


def test_zero_rows_count_as_none_and_with_an_open_gate_everything_learns():
    fit, previous = opened(FIT(replace(SMALL, dropout=0.))), torch.randn(2, 8, 48)
    previous[0] = 0
    start = fit.start(previous, 2)
    assert start[0].equal(fit.latents) and not start[1].equal(fit.latents)
    out = fit(torch.randn(2, 3, 4, 10, 16), torch.tensor([-.5, .3]), conditions(2), previous)[0]
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in fit.parameters())


@pytest.mark.parametrize('low_res', [False, True])
def test_prepared_conditions_give_the_same_answer(low_res):
    c = replace(SMALL, low_res=low_res)
    fit, told, x = FIT(c).eval(), conditions(2, c), torch.randn(2, 3, 4, 10, 16)
    torch.testing.assert_close(fit(x, torch.zeros(2), replace(told, prepared=fit.prepare(told))), fit(x, torch.zeros(2), told), rtol=0, atol=0)


def test_bf16_autocast_is_close():
    torch.manual_seed(0)
    fit, told, x = FIT(replace(SMALL, dropout=0.)).eval(), conditions(2), torch.randn(2, 3, 4, 10, 16)
    with torch.no_grad():
        exact = fit(x, torch.zeros(2), told)[0]
        with torch.autocast('cpu', torch.bfloat16): half = fit(x, torch.zeros(2), told)[0]
    assert (half - exact).square().mean().sqrt() < .05*exact.square().mean().sqrt()


@pytest.mark.parametrize('change, message', [(dict(latents=6), 'shared evenly among 4 groups'), (dict(patch_head=7), 'cannot be split into heads of 7'), (dict(latent_head=20), 'heads of 20')])
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message), torch.device('meta'): FIT(replace(SMALL, **change))


@pytest.mark.parametrize('name, millions', [('fit-500m', 499.8), ('fit-3.9b', 3921), ('fit-3.9b-up', 4069)])
def test_the_papers_sizes(name, millions):
    assert abs(sum(p.numel() for p in SnapVideo.from_preset(name, 'meta').parameters())/1e6/millions - 1) < .01


# The model

@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_survives_json(name): assert ModelConfig.from_dict(json.loads(json.dumps(PRESETS[name].to_dict()))) == PRESETS[name]


def test_saving_is_exact_and_readable_by_everyone(model, saved):
    loaded = SnapVideo.from_pretrained(saved)
    assert model.state_dict().keys() == loaded.state_dict().keys() and all(a.equal(b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert loaded.config == model.config and loaded.text.tokenizer_json == TOKENIZER and not loaded.training
    assert sorted(p.name for p in saved.iterdir()) == ['README.md', 'config.json', 'model.safetensors', 'tokenizer.json']
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in saved.iterdir())


def edit_weights(change):
    def edit(folder):
        tensors = load_file(folder/'model.safetensors')
        change(tensors)
        save_file(tensors, folder/'model.safetensors')
    return edit


def edit_config(change):
    def edit(folder):
        config = json.loads((folder/'config.json').read_text())
        (folder/'config.json').write_text(json.dumps(change(config)))
    return edit


def overwrite(name, content): return lambda folder: (folder/name).write_bytes(content(folder/name) if callable(content) else content)


DAMAGE = {
    'weights cut short': overwrite('model.safetensors', lambda f: f.read_bytes()[:-100]),
    'weights empty': overwrite('model.safetensors', b''),
    'a header that lies': overwrite('model.safetensors', lambda f: (10**15).to_bytes(8, 'little') + f.read_bytes()[8:]),
    'a tensor is missing': edit_weights(lambda t: t.pop('network.latents')),
    'a tensor too many': edit_weights(lambda t: t.update(more=torch.zeros(1))),
    'a tensor of another shape': edit_weights(lambda t: t.update({'network.latents': torch.zeros(9, 32)})),
    'configuration cut short': overwrite('config.json', lambda f: f.read_bytes()[:50]),
    'configuration not text': overwrite('config.json', b'\xff\xfe\x00'),
    'configuration a list': edit_config(lambda c: [c]),
    'configuration a number': edit_config(lambda c: 3),
    'another version': edit_config(lambda c: c | dict(version=2)),
    'another network': edit_config(lambda c: c | dict(kind='gan')),
    'no network': edit_config(lambda c: {k: v for k, v in c.items() if k != 'network'}),
    'network a word': edit_config(lambda c: c | dict(network='large')),
    'an unknown field': edit_config(lambda c: c | dict(colour='red')),
    'a patch of nothing': edit_config(lambda c: c | dict(network=c['network'] | dict(patch=[0, 0, 0]))),
    'an unknown encoder': edit_config(lambda c: c | dict(text=dict(kind='telepathy'))),
    'no encoder': edit_config(lambda c: c | dict(text=None)),
    'tokenizer not JSON': overwrite('tokenizer.json', b'{'),
    'tokenizer not text': overwrite('tokenizer.json', b'\xff'),
}


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_every_damage_is_one_line(saved, damage):
    damage(saved)
    with pytest.raises(ValueError) as caught: SnapVideo.from_pretrained(saved)
    assert '\n' not in str(caught.value) and str(caught.value).startswith(f'{saved}: damaged model (') and len(str(caught.value)) < 300 + len(str(saved))


class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', 'tokenizer.json', 'pytorch_model.bin'])
def test_a_pickle_is_never_opened(saved, tmp_path, name):
    (saved/name).write_bytes(pickle.dumps(Trap(tmp_path/'sprung')))
    try: SnapVideo.from_pretrained(saved)
    except ValueError: assert name != 'pytorch_model.bin'
    assert not (tmp_path/'sprung').exists()


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_a_missing_file_is_named(saved, name):
    (saved/name).unlink()
    with pytest.raises(FileNotFoundError, match=f'no {name}'): SnapVideo.from_pretrained(saved)


def test_a_write_that_fails_leaves_the_old_folder_whole(model, saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    def full(*_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(model_module, 'save_file', full)
    with pytest.raises(OSError, match='No space left'): model.save_pretrained(saved, force=True)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before and [p.name for p in saved.parent.iterdir()] == ['saved']


def test_a_folder_is_replaced_whole_and_only_when_told(model, saved):
    (saved/'old.txt').write_text('from before')
    with pytest.raises(FileExistsError, match='choose another folder or force'): model.save_pretrained(saved)
    model.save_pretrained(saved, force=True, dtype=torch.bfloat16)
    assert not (saved/'old.txt').exists() and [p.name for p in saved.parent.iterdir()] == ['saved']
    assert {t.dtype for t in load_file(saved/'model.safetensors').values()} == {torch.bfloat16}


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path/'taken').write_text('precious')
    for force in (False, True):
        with pytest.raises(FileExistsError, match='it is a file'), whole_folder(tmp_path/'taken', force): pass
    assert (tmp_path/'taken').read_text() == 'precious'


@pytest.mark.parametrize('call, message', [
    (lambda m, c: m(torch.zeros(1, 3, 4, 9, 17), 1., c), r'clips of shape \(3, 4, 9, 16\), not \(3, 4, 9, 17\)'),
    (lambda m, c: m(torch.zeros(3, 4, 9, 16), 1., c), 'clips of shape'),
    (lambda m, c: m(torch.zeros(2, *m.shape), 1., c), 'there are 2 clips, but conditions for 1'),
    (lambda m, c: m(torch.zeros(1, *m.shape), torch.ones(2), c), 'one value for each of the 1 samples'),
    (lambda m, c: m.conditions(CAPTIONS, fps=-8), 'must be positive'),
    (lambda m, c: m.conditions(CAPTIONS, fps=math.nan), 'must be positive'),
    (lambda m, c: m.conditions(CAPTIONS, size=(0, 64)), 'must be positive'),
    (lambda m, c: m.conditions('a snail'), 'list of captions'),
    (lambda m, c: SnapVideo.from_preset('huge'), "unknown preset 'huge'"),
], ids=str)
def test_what_does_not_fit_is_one_line(model, call, message):
    with pytest.raises(ValueError, match=message) as caught: call(model, model.conditions(CAPTIONS[:1]))
    assert '\n' not in str(caught.value)


def test_conditions_per_clip(model):
    c = model.conditions(CAPTIONS, fps=[8, 24, math.inf], size=[[9, 16], [720, 1280], [64, 64]])
    assert c.fps.tolist() == [8, 24, math.inf] and c.size[1].tolist() == [720, 1280]
    noisy = torch.randn(3, *model.shape)
    denoised, latents = model(noisy, torch.tensor([.1, 1., 10.]), c)
    again, _ = model(noisy, torch.tensor([.1, 1., 10.]), model.prepare(c), latents)
    assert denoised.isfinite().all() and not again.equal(denoised)


def test_a_copy_for_averaging_is_independent(model):
    other = copy.deepcopy(model)
    with torch.no_grad(): next(other.parameters()).add_(1)
    assert not next(other.parameters()).equal(next(model.parameters())) and other.config == model.config


def test_an_upload_sends_exactly_the_saved_folder(model, monkeypatch):
    "The Hub's mixin against a stand-in of its client: what would be uploaded loads as the same model."
    hub_mixin = pytest.importorskip('huggingface_hub.hub_mixin')
    sent = {}

    class Client:
        def __init__(self, **_): pass
        def create_repo(self, repo_id, **_): return type('Repo', (), dict(repo_id=repo_id))
        def upload_folder(self, repo_id, folder_path, **_):
            sent[repo_id] = sorted(p.name for p in folder_path.iterdir()), SnapVideo.from_pretrained(folder_path)

    monkeypatch.setattr(hub_mixin, 'HfApi', Client)
    model.push_to_hub('someone/snail-films')
    names, loaded = sent['someone/snail-films']
    assert names == ['README.md', 'config.json', 'model.safetensors', 'tokenizer.json']
    assert all(a.equal(b) for a, b in zip(model.parameters(), loaded.parameters()))


def test_a_download_takes_no_other_files(model, saved, monkeypatch):
    asked = {}
    def download(name, allow_patterns): asked.update(name=name, patterns=allow_patterns); return str(saved)
    monkeypatch.setattr(model_module, 'snapshot_download', download)
    SnapVideo.from_pretrained('someone/snail-films')
    assert asked == dict(name='someone/snail-films', patterns=['*.json', '*.safetensors', '*.md'])


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def download(*_, **__): raise ConnectionError('a long story\nover many lines')
    monkeypatch.setattr(model_module, 'snapshot_download', download)
    with pytest.raises(FileNotFoundError, match=r'neither a folder nor a Hub model within reach \(ConnectionError\)') as caught: weights_folder('nobody/nothing')
    assert '\n' not in str(caught.value)


def test_a_frozen_encoder_is_kept_by_name_alone(tmp_path):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {w: i for i, w in enumerate(['<pad>', '</s>', '<unk>', *sorted({w for c in CAPTIONS for w in c.split()})])}
    pieces = Tokenizer(models.WordLevel(words, unk_token='<unk>'))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token='<pad>', eos_token='</s>', unk_token='<unk>').save_pretrained(tmp_path/'t5')
    torch.manual_seed(0)
    transformers.T5Model(transformers.T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)).save_pretrained(tmp_path/'t5')
    model = SnapVideo(replace(PRESETS['tiny'], text=dict(kind='hf', name=str(tmp_path/'t5'), length=16, width=32))).eval()
    assert all(name.startswith('network.') for name in model.state_dict())
    noisy, told = torch.randn(1, *model.shape), model.conditions(CAPTIONS[:1])
    folder = model.save_pretrained(tmp_path/'saved')
    assert not (folder/'tokenizer.json').exists()
    loaded = SnapVideo.from_pretrained(folder)
    torch.testing.assert_close(loaded(noisy, 1., loaded.conditions(CAPTIONS[:1])), model(noisy, 1., told), rtol=0, atol=0)
    shutil.rmtree(tmp_path/'t5')
    with pytest.raises(FileNotFoundError, match='t5'): SnapVideo.from_pretrained(folder).conditions(CAPTIONS[:1])


def test_the_shipped_model_is_the_preset_and_small():
    folder = weights_folder('mini')
    assert SnapVideo.from_pretrained('mini').config == PRESETS['mini']
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 12e6

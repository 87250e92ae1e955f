"""The paper's benchmarks on stand-in folders: what is read, what is refused, what is measured. Inception, C3D and CLIP have random weights here; their real ones were never tried."""
import json, math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch
from safetensors.torch import save_file

from snapvideo_nb.benchmarks import C3D, UCF_PROMPTS, ClipSpace, Inception, apportion, clipsim, inception_score, measure, msrvtt, msrvtt_test, paper_table, real_clips, square, ucf101, ucf_split, with_weights
from snapvideo_nb.data import Shapes
from snapvideo_nb.distances import Extractor, random_extractor
from snapvideo_nb.video import write_video

KINDS = dict(HandStandPushups=2, Biking=3, YoYo=5)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Small folders in the form of UCF-101 and MSR-VTT; the former with the one class whose files are spelt otherwise."
    home, scenes, lines, told = tmp_path_factory.mktemp('sets'), Shapes(20, 24, 32), [], dict(videos=[], sentences=[])
    for j, (kind, k) in enumerate((kind, k) for kind, n in KINDS.items() for k in range(n)):
        name = f'{kind}/v_{kind}_g{k:02}_c01.avi'
        for path in (home/'ucf/UCF-101'/name, home/f'vtt/TestVideo/video{j}.mp4'):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, scenes[j].frames, 25)
        lines.append(f'{name} {j}')
        told['videos'].append(dict(video_id=f'video{j}', split='test' if j % 2 else 'train'))
        told['sentences'] += [dict(video_id=f'video{j}', caption=f'  caption {i}  of {j} ') for i in range(3)]
    (home/'ucf/ucfTrainTestlist').mkdir()
    (home/'ucf/ucfTrainTestlist/trainlist01.txt').write_text('\n'.join(lines) + '\n\n')
    (home/'vtt/test_videodatainfo.json').write_text(json.dumps(told))
    return home


def generate(captions, seeds):
    "A model that draws: clips depend on caption and seed."
    for caption, seed in zip(captions, seeds): yield np.random.default_rng([seed, len(caption)]).integers(0, 256, (16, 18, 32, 3), dtype=np.uint8)


def lively(network):
    "Random weights with which signals do not die on the way."
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear)): torch.nn.init.kaiming_normal_(layer.weight)
    return network.eval()


def test_the_tables_are_the_papers():
    four, five = paper_table(4), paper_table(5)
    assert (len(four['rows']), len(five['rows'])) == (10, 12) and '2402.14797' in four['source']
    assert four['rows'][-1] == dict(model='Snap Video, 512x288', FVD=200.2, FID=28.1, IS=38.89)
    assert five['rows'][-2] == {'model': 'Snap Video, 288x288', 'CLIP-FID': 8.48, 'FVD': 110.4, 'CLIPSIM': .2793}
    for table in (four, five): assert all(set(row) == {'model', *table['lower_is_better']} and any(v is not None for k, v in row.items() if k != 'model') for row in table['rows'])
    with pytest.raises(ValueError, match='4 and 5'): paper_table(3)


def test_every_class_has_a_prompt_of_its_own():
    assert len(UCF_PROMPTS) == len(set(UCF_PROMPTS.values())) == 101
    assert all(prompt == prompt.strip() and 3 <= len(prompt.split()) <= 12 and not prompt.endswith('.') for prompt in UCF_PROMPTS.values())


def test_the_split_is_read_with_its_odd_spelling(folder):
    found = ucf_split(folder/'ucf')
    assert Counter(kind for _, kind in found) == dict(HandstandPushups=2, Biking=3, YoYo=5) and all(path.is_file() for path, _ in found)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='trainlist02.txt'): ucf_split(folder/'ucf', 'trainlist02')
    with pytest.raises(FileNotFoundError, match='videodatainfo'): msrvtt_test(tmp_path)
    lists = tmp_path/'ucfTrainTestlist'
    lists.mkdir()
    for text, error, says in (('Biking/v.avi 1', FileNotFoundError, 'v.avi'), ('Flying/v.avi 1', ValueError, 'no class'), ('\n', ValueError, 'no video')):
        (lists/'trainlist01.txt').write_text(text)
        with pytest.raises(error, match=says): ucf_split(tmp_path)
    table = tmp_path/'x_videodatainfo.json'
    table.write_text('{')
    with pytest.raises(ValueError, match='not JSON'): msrvtt_test(tmp_path)
    table.write_text(json.dumps(dict(videos=[dict(video_id='video9', split='test')], sentences=[dict(video_id='video9', caption='x')])))
    with pytest.raises(FileNotFoundError, match='video9.mp4'): msrvtt_test(tmp_path)
    table.write_text(json.dumps(dict(videos=[dict(video_id='video9', split='train')], sentences=[dict(video_id='video9', caption='x')])))
    with pytest.raises(ValueError, match='no caption of the test split'): msrvtt_test(tmp_path)


def test_captions_of_the_test_split_alone_are_taken(folder):
    found = msrvtt_test(folder/'vtt')
    assert len(found) == 15 and found[0][1] == 'caption 0 of 1' and {path.stem for path, _ in found} == {f'video{j}' for j in (1, 3, 5, 7, 9)}


@pytest.mark.parametrize('counts, total', [(dict(a=1, b=2, c=4), 100), (dict(a=5), 3), (dict(a=0, b=7, c=7, d=1), 11), ({str(i): 73 + 13*i % 60 for i in range(101)}, 10_000)])
def test_shares_add_up_and_are_off_by_less_than_one(counts, total):
    shares = apportion(counts, total)
    assert sum(shares.values()) == total and all(abs(shares[k] - total*n/sum(counts.values())) < 1 for k, n in counts.items())


def test_real_clips_are_the_middle_in_the_asked_shape(folder):
    path, _ = ucf_split(folder/'ucf')[0]
    whole, = real_clips([path], 20, 24, 32)
    middle, = real_clips([path], 16, 24, 32)
    assert np.array_equal(middle, whole[2:18]) and next(real_clips([path], 16, 12, 12)).shape == (16, 12, 12, 3)
    long, = real_clips([path], 30, 24, 32)
    assert np.array_equal(long[:20], whole) and all(np.array_equal(frame, whole[-1]) for frame in long[20:])


def test_squares_are_the_centre():
    clip = np.random.default_rng(0).integers(0, 256, (2, 5, 9, 3), dtype=np.uint8)
    assert np.array_equal(square(clip), clip[:, :, 2:7]) and np.array_equal(square(clip.transpose(0, 2, 1, 3)), clip.transpose(0, 2, 1, 3)[:, 2:7])


@pytest.mark.parametrize('classes, splits', [(3, 1), (10, 5)])
def test_the_score_of_sharp_even_answers_is_the_number_of_classes(classes, splits):
    assert inception_score(1e3*torch.eye(classes).repeat(10, 1), splits)[0] == pytest.approx(classes)


def test_the_score_in_closed_form():
    "Two kinds of clips, answered p and 1-p: exp(ln 2 - H(p))."
    p = torch.tensor([[.9, .1], [.1, .9]]).log().repeat(6, 1)
    assert inception_score(p, 1)[0] == pytest.approx(math.exp(math.log(2) + .9*math.log(.9) + .1*math.log(.1)))
    assert inception_score(p + 7, 3) == pytest.approx(inception_score(p, 3))


def test_inception_and_c3d_have_the_sizes_that_are_known():
    with torch.device('meta'):
        assert sum(p.numel() for p in Inception(classes=1000).parameters()) == 23_834_568
        names = set(Inception().state_dict())
        assert C3D().fc6.in_features == 8192 and C3D()(torch.empty(2, 3, 16, 112, 112)).shape == (2, 101)
    assert {'Conv2d_4a_3x3.bn.running_mean', 'Mixed_5c.branch5x5_2.conv.weight', 'Mixed_6a.branch3x3dbl_3.conv.weight', 'Mixed_7a.branch7x7x3_4.conv.weight', 'Mixed_7b.branch3x3dbl_3b.bn.bias'} <= names


def test_weights_are_read_by_name_and_refused_by_shape(tmp_path):
    torch.manual_seed(0)
    network, path = C3D(classes=4, thin=16).eval(), tmp_path/'c3d.safetensors'
    network.mean = torch.full((3, 1, 1, 1), 100.)
    save_file(network.state_dict(), path)
    x = torch.rand(1, 3, 16, 112, 112)
    torch.testing.assert_close(with_weights(C3D(classes=4, thin=16), path)(x), network(x))
    rest = {name: t for name, t in network.state_dict().items() if name != 'conv4a.bias'}
    save_file(rest, path)
    with pytest.raises(ValueError, match='conv4a.bias should be .* and is missing'): with_weights(C3D(classes=4, thin=16), path)
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match='not a safetensors file'): with_weights(C3D(classes=4, thin=16), path)
    with pytest.raises(FileNotFoundError, match='no such file'): with_weights(network, tmp_path/'none')


def test_clip_reads_captions_whole_and_pictures_normalised(tmp_path):
    transformers = pytest.importorskip('transformers')
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    pieces = Tokenizer(models.WordLevel(unk_token='<unk>'))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.train_from_iterator(UCF_PROMPTS.values(), trainers.WordLevelTrainer(special_tokens=['<pad>', '</s>', '<unk>'], show_progress=False))
    pieces.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token='<pad>', eos_token='</s>', unk_token='<unk>').save_pretrained(tmp_path)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=small | dict(vocab_size=512, max_position_embeddings=16, eos_token_id=1, bos_token_id=0, pad_token_id=0),
                                                           vision_config=small | dict(image_size=32, patch_size=8), projection_dim=16)).eval()
    model.save_pretrained(tmp_path)
    space, words = ClipSpace(tmp_path), list(UCF_PROMPTS.values())
    together = space.text(words, batch=7)
    torch.testing.assert_close(together[40:41], space.text(words[40:41]), rtol=1e-4, atol=1e-5)
    assert torch.pdist(together).min() > 1e-4 and space.text(['a ' + 'very '*40 + 'long caption']).isfinite().all()
    picture = torch.rand(1, 3, 32, 32)
    wanted = model.visual_projection(model.vision_model(pixel_values=(picture - torch.tensor(space.mean).reshape(3, 1, 1))/torch.tensor(space.deviation).reshape(3, 1, 1)).pooler_output)
    torch.testing.assert_close(space.vision(2*picture - 1), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(FileNotFoundError, match='no saved CLIP model'): ClipSpace(tmp_path/'none')


def test_clipsim_of_copies_is_one():
    x = torch.randn(3, 1, 8)
    assert clipsim(x.expand(3, 5, 8), 7*x[:, 0]).tolist() == pytest.approx([1]*3)
    with pytest.raises(ValueError, match='3 clips, but 2 captions'): clipsim(x, x[:2, 0])


def test_table_four_end_to_end(folder, tmp_path):
    networks = dict(fid=Extractor('Inception', lively(Inception(4, thin=16)), 'random', frames=2, side=96), actions=Extractor('C3D', lively(C3D(4, thin=16)), 'random', side=112))
    found = ucf101(generate, folder/'ucf', random_extractor(), count=20, kept=tmp_path, **networks)
    assert found['protocol']['classes'] == dict(HandstandPushups=4, Biking=6, YoYo=10) and json.loads(json.dumps(found)) == found
    assert (found['FVD']['made'], found['FVD']['real'], found['FVD']['with_floor']['count']) == (20, 10, 5) and found['FVD']['all'] > 0 and 1 < found['IS']['mean'] <= 4 and found['FID']['all'] > .01
    assert ucf101(generate, folder/'ucf', random_extractor(), count=20, kept=tmp_path, **networks) == found
    alone = ucf101(generate, folder/'ucf', random_extractor(), count=20)
    assert alone['FID'] is alone['IS'] is None and alone['FVD']['all'] == pytest.approx(found['FVD']['all'], rel=1e-3)


def test_table_five_end_to_end(folder):
    see = replace(random_extractor(frames=2), name='stand-in for CLIP')
    found = msrvtt(generate, folder/'vtt', random_extractor(), see, lambda captions: torch.ones(len(captions), 160), crop=True)
    assert (found['FVD']['made'], found['FVD']['real']) == (15, 5) and -1 <= found['CLIPSIM'] <= 1 and found['CLIP-FID']['all'] > 0
    fewer = msrvtt(generate, folder/'vtt', random_extractor(), count=6)
    assert fewer['protocol']['made'] == 6 and fewer['CLIPSIM'] is fewer['CLIP-FID'] is None


def test_clips_stream_and_both_sides_see_one_shape(folder):
    "No clip is asked for before those ahead of it are done with; what is real is cut to the shape of what was made."
    open_now, most = [], []
    def stream():
        for j in range(12): open_now.append(j); yield np.zeros((16, 18, 32, 3), np.uint8); most.append(len(open_now))
    class Watch(torch.nn.Module):
        def __init__(self): super().__init__(); self.shapes, self.p = [], torch.nn.Parameter(torch.zeros(1))
        def forward(self, video): self.shapes.append(len(video)); open_now.clear(); return video.flatten(2).mean(2)
    watch = Watch()
    made, real = measure(stream(), [path for path, _ in ucf_split(folder/'ucf')], dict(x=Extractor('watch', watch, '', side=8)), batch=3)
    assert made['x'].shape == (12, 3) and real['x'].shape == (10, 3) and max(most) <= 4
    with pytest.raises(ValueError, match='made no clip'): measure([], [], {})

"The hypergradient outside the notebook: a model of somebody else's, several processes, a GPU."
import pytest
import torch
import torch.distributed as dist
from torch import nn

from interference_nb.meta_adapters import exact, finite_difference, hypergradient
from interference_nb.pretrain import mean_over_processes


def flat(tensors): return torch.cat([t.reshape(-1) for t in tensors])


def test_hugging_face_model_with_dropout():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    size = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**size, intermediate_size=32))
    mine = {n for n, _ in bert.named_parameters() if n.endswith('bias') or 'LayerNorm' in n}
    theta = [p for n, p in bert.named_parameters() if n not in mine]
    phi = [p for n, p in bert.named_parameters() if n in mine]
    losses = [lambda b=b: bert(input_ids=b, labels=b).loss for b in torch.randint(50, (3, 4, 10))]
    before, found = [p.detach().clone() for p in bert.parameters()], {}
    for estimator in (exact, finite_difference):
        torch.manual_seed(1)
        h = hypergradient(theta, phi, losses[0], losses[1:], 0.5, estimator, eps=1e-3)
        found[estimator] = flat(h.total)
    difference = found[exact] - found[finite_difference]
    assert difference.norm() < 1e-3 * found[exact].norm()
    assert all(torch.equal(p, q) for p, q in zip(bert.parameters(), before))


def little(rank):
    "A small model and, for each of two processes, its losses."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    net = net.double()
    data = [[(torch.randn(8, 4).double(), torch.randint(3, (8,))) for _ in range(3)]
            for _ in range(2)]
    losses = [[lambda d=d: nn.functional.cross_entropy(net(d[0]), d[1]) for d in own]
              for own in data]
    phi = list(net[2].parameters())
    theta = [p for p in net.parameters() if all(p is not q for q in phi)]
    return theta, phi, losses if rank is None else losses[rank]


def work(rank, address, estimator, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{address}', rank=rank, world_size=2)
    theta, phi, losses = little(rank)
    h = hypergradient(theta, phi, losses[0], losses[1:], 0.5, estimator, 1e-4,
                      average=mean_over_processes)
    torch.save([h.direct, h.second_order], f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.parametrize('estimator', [exact, finite_difference])
def test_two_processes_are_one_with_twice_the_batches(estimator, tmp_path):
    args = (tmp_path / 'address', estimator, tmp_path)
    torch.multiprocessing.spawn(work, args, nprocs=2)
    theta, phi, (a, b) = little(None)
    h = hypergradient(theta, phi, [a[0], b[0]], [*a[1:], *b[1:]], 0.5, estimator, 1e-4)
    for rank in (0, 1):
        direct, second = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        torch.testing.assert_close(flat(direct), flat(h.direct))
        torch.testing.assert_close(flat(second), flat(h.second_order), rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('autocast', [False, True])
def test_gpu_replays_its_noise(autocast):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Dropout(.5), nn.Linear(64, 3)).cuda()
    x, y = torch.randn(32, 4, device='cuda'), torch.randint(3, (32,), device='cuda')
    loss = lambda: nn.functional.cross_entropy(net(x), y)
    theta, phi, found = list(net[0].parameters()), list(net[3].parameters()), {}
    before = [p.detach().clone() for p in theta]
    for estimator in (exact, finite_difference):
        torch.manual_seed(1)
        with torch.autocast('cuda', dtype=torch.float16, enabled=autocast):
            found[estimator] = flat(hypergradient(theta, phi, loss, [loss], 0.5, estimator).total)
    assert (found[exact] - found[finite_difference]).norm() < 1e-2 * found[exact].norm()
    assert all(torch.equal(p, q) for p, q in zip(theta, before))

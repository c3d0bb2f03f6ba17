"""Node lists as Slurm writes them, and hostfiles: right ones read back, wrong ones refused with file, line and mend."""

import pytest

from distlm.errors import DistlmError
from launchers.hosts.nodes import (
    Host,
    expand_counts,
    expand_nodes,
    parse_hosts,
    read_hostfile,
    require_equal,
    require_ranks,
    slurm_hosts,
    write_hostfile,
)

NODE_LISTS = [
    ("node1", ["node1"]),
    ("node[1-3]", ["node1", "node2", "node3"]),
    ("node[1,3-4]", ["node1", "node3", "node4"]),
    ("rack[0-1]node[2-3]", ["rack0node2", "rack0node3", "rack1node2", "rack1node3"]),
    ("n[5],m[1-2]", ["n5", "m1", "m2"]),
    ("n[008-011]", ["n008", "n009", "n010", "n011"]),
    ("gpu-a[1-2]-ib,login", ["gpu-a1-ib", "gpu-a2-ib", "login"]),
    ("b2,a1,b[1,10]", ["b2", "a1", "b1", "b10"]),
    ("n[9-11]", ["n9", "n10", "n11"]),
]
"""Node list → names; tests/slurm/test_status.py asks the real scontrol for the same."""


@pytest.mark.parametrize(("text", "names"), NODE_LISTS)
def test_node_lists(text, names):
    assert expand_nodes(text) == names


@pytest.mark.parametrize("text", ["n[1-", "n1-3]", "n[3-1]", "n[a-b]", "n[]", "n[1-2-3]", "n[[1]]"])
def test_a_broken_node_list_is_refused(text):
    with pytest.raises(DistlmError, match="node list"):
        expand_nodes(text)


def test_counts_per_node():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(DistlmError, match="counts per node"):
        expand_counts("2(y3)")


def test_a_hostfile_reads_back(tmp_path):
    hosts = [Host("a", 4), Host("b-1.cluster", 2)]
    write_hostfile(tmp_path / "hosts", hosts)
    assert (tmp_path / "hosts").read_text("utf-8") == "a slots=4\nb-1.cluster slots=2\n"
    assert read_hostfile(tmp_path / "hosts") == hosts
    (tmp_path / "by_hand").write_text("# two nodes\n\na   slots=4  # the first\n  b slots = 2\n", "utf-8")
    assert read_hostfile(tmp_path / "by_hand") == [Host("a", 4), Host("b", 2)]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a slots=2\nb\n", r"hosts:2: 'b' is no host; write it as `HOST slots=RANKS`"),
        ("a slots=2\n\nb slots=0\n", r"hosts:3: slots=0 of b: must be a number of ranks, 1 or more"),
        ("a slots=-1\n", r"hosts:1: slots=-1 of a"),
        ("a slots=two\n", r"hosts:1: slots=two of a"),
        ("a slots=1\nb slots=1\na slots=2\n", r"hosts:3: a was there already \(.*hosts:1\); keep one line"),
        ("a slots=1 max_slots=2\n", r"hosts:1: 'a slots=1 max_slots=2' is no host"),
        ("$(reboot) slots=1\n", r"hosts:1: '\$\(reboot\)' is no host name"),
        ("-oProxyCommand=x slots=1\n", r"hosts:1: '-oProxyCommand=x' is no host name"),
        ("# nothing\n", r"hosts: no hosts in it"),
    ],
)
def test_a_wrong_hostfile_is_refused(tmp_path, text, error):
    (tmp_path / "hosts").write_text(text, "utf-8")
    with pytest.raises(DistlmError, match=error):
        read_hostfile(tmp_path / "hosts")


def test_a_missing_hostfile_is_refused(tmp_path):
    with pytest.raises(DistlmError, match=r"nowhere: no such hostfile; write"):
        read_hostfile(tmp_path / "nowhere")


def test_hosts_as_an_argument():
    assert parse_hosts("a:4,b[1-2]:2") == [Host("a", 4), Host("b1", 2), Host("b2", 2)]
    for text, error in (("a", "has no slots"), ("a:0", "slots=0"), ("a:2,a:2", "was there already"), ("", "no hosts")):
        with pytest.raises(DistlmError, match=error):
            parse_hosts(text)


def test_hosts_of_a_slurm_job():
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)"}
    assert slurm_hosts(job, 4) == [Host("n1", 2), Host("n2", 2)]
    assert slurm_hosts(job | {"SLURM_TASKS_PER_NODE": "2,1"}, 3) == [Host("n1", 2), Host("n2", 1)]
    # One task a node is a launcher; its GPUs say how many ranks it starts.
    launcher = job | {"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_PER_NODE": "v100:4"}
    assert slurm_hosts(launcher, 8) == [Host("n1", 4), Host("n2", 4)]
    assert slurm_hosts(launcher, 6, slots_per_node=3) == [Host("n1", 3), Host("n2", 3)]
    with pytest.raises(DistlmError, match=r"--ranks 6 does not fit .*SLURM_TASKS_PER_NODE=1\(x2\).*per-node 3"):
        slurm_hosts(launcher, 6)
    with pytest.raises(DistlmError, match=r"no hosts given and this is no Slurm job.*--hostfile"):
        slurm_hosts({}, 4)


def test_slots_must_be_the_ranks_asked_for():
    hosts = [Host("a", 2), Host("b", 1)]
    require_ranks(hosts, 3, "--hosts")
    with pytest.raises(DistlmError, match=r"--ranks 4 asked, but --hosts gives 3 \(a slots=2, b slots=1\)"):
        require_ranks(hosts, 4, "--hosts")
    with pytest.raises(DistlmError, match=r"a has slots=2 and b slots=1; --via slurm needs equal slots"):
        require_equal(hosts, "--hosts", "slurm")

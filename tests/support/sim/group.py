# torch's stubs know less of these classes than there is.
# mypy: disable-error-code="override, attr-defined, call-arg, assignment"
"""torch.distributed on the device: collectives go over gloo with copies in the host's memory.

As with NCCL, a result is there when somebody has waited for it: until `wait` the tensors of the device are left as they
were, and what is never waited for never comes.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup, Work
from torch.futures import Future

NAME = "simccl"


class _Waited(Work):
    """Work on the host's copies; `fetch` brings them to the device when it is waited for."""

    def __init__(self, works: Sequence[Any], fetch: Callable[[], None], result: Any) -> None:
        super().__init__()
        self._works, self._fetch, self._result = list(works), fetch, result
        self._done = False

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self._done:
            for work in self._works:
                work.wait()
            self._fetch()
            self._done = True
        return True

    def is_completed(self) -> bool:
        return self._done or all(work.is_completed() for work in self._works)

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> Future[Any]:
        self.wait()
        future: Future[Any] = Future()
        future.set_result(self._result)
        return future

    def result(self) -> Any:
        return self._result


def _host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Their numbers in the host's memory; a tensor of the processor is its own."""
    return [tensor if tensor.device.type == "cpu" else tensor.detach().cpu() for tensor in tensors]


def _fetch(hosts: Sequence[Tensor], tensors: Sequence[Tensor]) -> Callable[[], None]:
    def fetch() -> None:
        with torch.no_grad():
            for host, tensor in zip(hosts, tensors, strict=True):
                if host is not tensor:
                    tensor.copy_(host)

    return fetch


class SimGroup(ProcessGroup):
    """The collectives of NCCL's group, each by the same one of gloo."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return NAME

    def _in_place(self, call: Callable[..., Any], tensors: list[Tensor], *rest: Any) -> Work:
        hosts = _host(tensors)
        return _Waited([call(hosts, *rest)], _fetch(hosts, tensors), tensors)

    def allreduce(self, tensors: Any, opts: Any = None) -> Work:
        return self._in_place(self._gloo.allreduce, tensors, opts or dist.AllreduceOptions())

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Work:
        plain = dist.AllreduceOptions()
        if opts is not None:
            plain.reduceOp = opts.reduceOp
        hosts = _host(tensors)
        return _Waited([self._gloo.allreduce([host], plain) for host in hosts], _fetch(hosts, tensors), tensors)

    def broadcast(self, tensors: Any, opts: Any = None) -> Work:
        return self._in_place(self._gloo.broadcast, tensors, opts or dist.BroadcastOptions())

    def reduce(self, tensors: Any, opts: Any = None) -> Work:
        return self._in_place(self._gloo.reduce, tensors, opts or dist.ReduceOptions())

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        hosts = [_host(parts) for parts in outputs]
        work = self._gloo.allgather(hosts, _host(inputs))
        flat = [part for parts in hosts for part in parts]
        return _Waited([work], _fetch(flat, [part for parts in outputs for part in parts]), outputs)

    def _allgather_base(self, output: Tensor, given: Tensor, opts: Any = None) -> Work:
        (host,) = _host([output])
        parts = list(host.view(-1).chunk(self.size()))
        kept = [part.clone() for part in parts]
        work = self._gloo.allgather([kept], [_host([given])[0].reshape(-1)])

        def fetch() -> None:
            with torch.no_grad():
                output.copy_(torch.cat(kept).view_as(output))

        return _Waited([work], fetch, output)

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        works = [self._allgather_base(output, given) for output, given in zip(outputs, inputs, strict=True)]
        return _Waited(works, lambda: None, outputs)

    def _reduced_share(self, output: Tensor, whole: Tensor, op: Any) -> Work:
        options = dist.AllreduceOptions()
        if op is not None:
            options.reduceOp = op
        share = whole.view(-1).chunk(self.size())[self.rank()]

        def fetch() -> None:
            with torch.no_grad():
                output.copy_(share.view_as(output))

        return _Waited([self._gloo.allreduce([whole], options)], fetch, output)

    def _reduce_scatter_base(self, output: Tensor, given: Tensor, opts: Any = None) -> Work:
        return self._reduced_share(output, _host([given])[0].clone().contiguous(), opts.reduceOp if opts else None)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        op = opts.reduceOp if opts else None
        wholes = [torch.cat([part.reshape(-1) for part in _host(parts)]) for parts in inputs]
        works = [self._reduced_share(output, whole, op) for output, whole in zip(outputs, wholes, strict=True)]
        return _Waited(works, lambda: None, outputs)

    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        works = [self._reduce_scatter_base(output, given, opts) for output, given in zip(outputs, inputs, strict=True)]
        return _Waited(works, lambda: None, outputs)

    def alltoall_base(self, output: Tensor, given: Tensor, out_sizes: Any, in_sizes: Any, opts: Any = None) -> Work:
        (host,) = _host([output])
        work = self._gloo.alltoall_base(host, _host([given])[0], out_sizes, in_sizes, dist.AllToAllOptions())
        return _Waited([work], _fetch([host], [output]), output)

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        hosts = _host(outputs)
        flat_in = torch.cat([part.reshape(-1) for part in _host(inputs)])
        flat_out = torch.empty(sum(host.numel() for host in hosts), dtype=flat_in.dtype)
        sizes = [host.numel() for host in hosts], [part.numel() for part in inputs]
        work = self._gloo.alltoall_base(flat_out, flat_in, *sizes, dist.AllToAllOptions())

        def fetch() -> None:
            with torch.no_grad():
                for output, part in zip(outputs, flat_out.split(sizes[0]), strict=True):
                    output.copy_(part.view_as(output))

        return _Waited([work], fetch, outputs)

    def gather(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        hosts = [_host(parts) for parts in outputs]
        work = self._gloo.gather(hosts, _host(inputs), opts or dist.GatherOptions())
        flat = [part for parts in hosts for part in parts]
        return _Waited([work], _fetch(flat, [part for parts in outputs for part in parts]), outputs)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        hosts = _host(outputs)
        work = self._gloo.scatter(hosts, [_host(parts) for parts in inputs], opts or dist.ScatterOptions())
        return _Waited([work], _fetch(hosts, outputs), outputs)

    # Their names since torch 2.13.
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base

    def send(self, tensors: Any, to: int, tag: int = 0) -> Work:
        return _Waited([self._gloo.send(_host(tensors), to, tag)], lambda: None, tensors)

    def recv(self, tensors: Any, source: int, tag: int = 0) -> Work:
        hosts = _host(tensors)
        return _Waited([self._gloo.recv(hosts, source, tag)], _fetch(hosts, tensors), tensors)

    def barrier(self, opts: Any = None) -> Work:
        return _Waited([self._gloo.barrier()], lambda: None, [])


def register_backend() -> None:
    """`init_process_group` knows the backend of the device, as it knows NCCL for CUDA."""
    dist.Backend.register_backend(NAME, SimGroup, devices=["sim"])

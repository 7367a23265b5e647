"""The GPU backend: ``mujoco_warp``, its memory seen as torch tensors; it runs on Warp's CPU device
too.

Every world has a model of its own: the fields in which compiled models differ are arrays over
worlds, everything else is shared. Height fields and their sizes are a library that worlds point
into. Numbers are float32 on this backend.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.errors import MetarobotError
from metarobot.sim.protocol import WorldSelection

try:
    import mujoco_warp as mjw
    import warp as wp
except ImportError as e:
    raise MetarobotError("MuJoCo Warp is not installed: pip install 'metarobot[gpu]'") from e

wp.config.log_level = logging.WARNING
_BATCHED = ("*",)
_FIELDS = ("hfield_size", "hfield_data")
"""Of a height field: what the library holds, a row for each model."""
_STATIC = ("geom_xpos", "geom_xmat")
"""Where geoms that never move are: computed once by MuJoCo Warp, so it has to be told when they
differ."""
_UNREAD = ("dof_length",)
"""What only the sleeping of bodies reads, which no model here asks for."""
BUFFERS = ("NEFC", "NJMAX_NNZ", "BROADPHASE", "NARROWPHASE", "CCD", "HFIELD", "EPA_HORIZON")
"""Overflows that lose a contact or a constraint, as MuJoCo Warp calls them."""
_LOST = sum(int(mjw.OverflowType[name]) for name in BUFFERS if name in mjw.OverflowType.__members__)


DRIVER = 12, 4
"""The first CUDA driver whose graphs can hold loops, as MuJoCo Warp's solver needs."""


class WarpError(MetarobotError):
    """Something that MuJoCo Warp, or this machine, cannot do."""


class BufferSizes(NamedTuple):
    """Sizes of the buffers of one world: an overflow loses contacts, too much room costs memory and
    time.
    """

    contacts: int
    """Contacts; shared between worlds, so this is what they need on average."""
    constraints: int
    """Rows of the constraint Jacobian; every world for itself."""


def warp_device(name: str) -> Any:
    """Return Warp's device for torch's ``cpu`` or ``cuda``, or say why there is none."""
    wp.init()
    if name == "cuda" and not wp.is_cuda_available():
        raise WarpError("Warp finds no CUDA device, or a driver too old for it; use --device cpu")
    if name == "cuda" and not wp.is_conditional_graph_supported():
        raise WarpError(
            f"MuJoCo Warp needs a CUDA driver of {'.'.join(map(str, DRIVER))} or newer, "
            f"not {'.'.join(map(str, wp.get_cuda_driver_version()))}; update it, or use --sim cpu"
        )
    return wp.get_device("cuda:0" if name == "cuda" else name)


def free_memory(name: str) -> int:
    """Return the bytes that torch's ``cuda`` has free; of the CPU, all that there are."""
    if name == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class WarpSim:
    """Worlds in MuJoCo Warp's arrays.

    ``step`` advances all worlds, also those asleep, whose state means nothing until the next reset.
    On a GPU the substeps of a control step are one CUDA graph.
    """

    def __init__(
        self,
        models: Sequence[mujoco.MjModel],
        *,
        device: str = "cpu",
        room: BufferSizes | None = None,
    ) -> None:
        self._device, self._nominal = warp_device(device), models[0]
        self._models: list[mujoco.MjModel] = list(models)
        self._library = _Library(models[0], str(wp.device_to_torch(self._device)))
        self._graphs: dict[int, Any] = {}
        with wp.ScopedDevice(self._device):
            self.model = _put(models[0])
            sizes = {} if room is None else {"nconmax": room.contacts, "njmax": room.constraints}
            try:
                self.data = mjw.make_data(models[0], nworld=len(models), **sizes)
            except (RuntimeError, MemoryError) as e:
                raise _too_large(len(models), e) from e
        # reported by ``lost``; printing from kernels would stop the device
        self.model.opt.warn_overflow = 0
        self._fresh = {
            k: self.bind(k).clone() for k in ("time", "act", "qacc_warmstart", "history")
        }
        self._overflow = wp.to_torch(self.data.overflow)
        self._lost = torch.zeros_like(self._overflow)
        self.set_models(models)
        if self._device.is_cuda:  # kernels are built and loaded before a graph is recorded
            with wp.ScopedDevice(self._device):
                self._advance(1)
                mjw.reset_data(self.model, self.data)

    @property
    def worlds(self) -> int:
        """Number of worlds."""
        return len(self._models)

    @property
    def bytes(self) -> int:
        """Memory of all arrays of models and data."""
        return _bytes(self.model) + _bytes(self.data)

    def know(self, models: Sequence[mujoco.MjModel]) -> None:
        """Take in models that worlds will be put on later."""
        for name in self._library.add(models):
            self._widen(name)

    def set_models(
        self, models: Sequence[mujoco.MjModel], ids: Sequence[int] | None = None
    ) -> None:
        """Put each world of ``ids`` (default: all) on its model; models it has seen cost a gather
        on the device.
        """
        for i, model in zip(range(self.worlds) if ids is None else ids, models, strict=True):
            self._models[i] = model
        self.know(models)
        rows = torch.tensor([self._library.row(m) for m in models], device=self._library.device)
        where: Any = slice(None) if ids is None else torch.tensor(list(ids), device=rows.device)
        for name in self._library.varied:
            if name in _FIELDS:
                continue
            self._view(name)[where] = self._library.rows[name][rows]
        if "hfield_data" in self._library.varied or "hfield_size" in self._library.varied:
            self._library.point(self._view("geom_dataid"), where, rows)

    def _widen(self, name: str) -> None:
        """Give a field a value for each world, or the library's new height fields; the graphs hold
        the old array.
        """
        self._graphs.clear()
        with wp.ScopedDevice(self._device):
            if name in _FIELDS:
                self._library.lay(self.model)
                name = "geom_dataid"
            if name == "geom_dataid" and self.model.geom_dataid.shape[0] == self.worlds:
                return
            if name not in _STATIC:
                holder = self.model.opt if hasattr(self.model.opt, name) else self.model
                shared = getattr(holder, name)
                wide = wp.empty((self.worlds, *shared.shape[1:]), dtype=shared.dtype)
                wp.to_torch(wide).copy_(wp.to_torch(shared)[:1].expand_as(wp.to_torch(wide)))
                wide._is_batched = True
                setattr(holder, name, wide)

    def _view(self, name: str) -> Tensor:
        """Return a model field over the worlds, ``(world, ...)``, or where static geoms are."""
        holder = next(h for h in (self.data, self.model.opt, self.model) if hasattr(h, name))
        view: Tensor = wp.to_torch(getattr(holder, name))
        return view

    def bind(self, field: str) -> Tensor:
        """Return the live tensor ``(world, ...)`` of an ``MjData`` field, float32 in MuJoCo's
        units.
        """
        live: Tensor = wp.to_torch(getattr(self.data, field))
        return live

    def step(self, substeps: int, rows: WorldSelection | None = None) -> Tensor:
        """Advance all worlds; return ``(world,)``, true where the physics broke down, or lost a
        contact.

        Nothing is read back. What worlds that are not in ``rows`` do is not counted.
        """
        with wp.ScopedDevice(self._device):
            if not self._device.is_cuda:
                self._advance(substeps)
            else:
                if substeps not in self._graphs:
                    with wp.ScopedCapture() as capture:
                        self._advance(substeps)
                    self._graphs[substeps] = capture.graph
                wp.capture_launch(self._graphs[substeps])
        lost = (self._overflow & _LOST) != 0
        if rows is not None:
            lost &= self._mask(rows)
        self._lost |= torch.where(lost, self._overflow & _LOST, 0)
        self._overflow.zero_()
        finite = torch.isfinite(self.bind("qpos").sum(1) + self.bind("qvel").sum(1))
        broken: Tensor = ~finite | lost
        return broken

    def _mask(self, rows: WorldSelection) -> Tensor:
        if isinstance(rows, Tensor):
            return rows
        return torch.zeros_like(self._overflow, dtype=torch.bool).index_fill_(
            0, torch.tensor(rows, device=self._overflow.device), True
        )

    def _advance(self, substeps: int) -> None:
        for _ in range(substeps):
            mjw.step(self.model, self.data)

    def lost(self) -> dict[str, int]:
        """Count, since the last call, the worlds in which each buffer overflowed; reads from the
        device.
        """
        bits = self._lost.clone().cpu()
        self._lost.zero_()
        counts = {name: int(((bits & int(mjw.OverflowType[name])) != 0).sum()) for name in BUFFERS}
        return {name: n for name, n in counts.items() if n}

    def reset(self, qpos: Tensor, qvel: Tensor, rows: WorldSelection | None = None) -> None:
        """Put worlds (default: all) into a fresh state with these joint positions and velocities.

        If all are, sensors of place and motion are current and those of forces zero; otherwise all
        keep what they have.
        """
        where = None if rows is None else self._mask(rows)
        if rows is not None and not isinstance(rows, Tensor):
            ids = torch.tensor(rows, device=self._overflow.device)
            qpos, qvel = (
                self.bind(k).index_copy(0, ids, x.float())
                for k, x in (("qpos", qpos), ("qvel", qvel))
            )
        for name, value in {"qpos": qpos, "qvel": qvel, **self._fresh}.items():
            live = self.bind(name)
            live.copy_(
                value
                if where is None
                else torch.where(where.view(-1, *[1] * (live.dim() - 1)), value, live)
            )
        if where is None and self._nominal.nsensordata:
            self.bind("sensordata").zero_()
            with wp.ScopedDevice(self._device):
                self._sense()

    def _sense(self) -> None:
        """Compute sensors of place and motion, as ``mj_forward`` does up to velocities."""
        mjw.fwd_position(self.model, self.data)
        mjw.sensor_pos(self.model, self.data)
        mjw.fwd_velocity(self.model, self.data)
        mjw.sensor_vel(self.model, self.data)

    def snapshot(self, world: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """Return one world's model and a copy of its data, forward kinematics computed: for
        pictures.
        """
        model = self._models[world]
        data = mujoco.MjData(model)
        for name in ("qpos", "qvel", "act", "ctrl"):
            getattr(data, name)[:] = self.bind(name)[world].cpu().numpy()
        mujoco.mj_forward(model, data)
        return model, data


class _Library:
    """The values of all models seen, of the fields in which they differ: ``rows[field]`` is
    ``(model, ...)``.
    """

    def __init__(self, nominal: mujoco.MjModel, device: str) -> None:
        self.device = device
        self.rows: dict[str, Tensor] = {}
        self._index: dict[int, int] = {}
        self._kept: list[mujoco.MjModel] = []
        self._nominal = _values(nominal)
        self._fixed = _fixed(nominal)
        self.grounds = nominal.nhfield

    @property
    def varied(self) -> Iterable[str]:
        """Name the fields in which models differ."""
        return self.rows.keys()

    def row(self, model: mujoco.MjModel) -> int:
        """Return the row of a model that was added."""
        return self._index[id(model)]

    def add(self, models: Sequence[mujoco.MjModel]) -> list[str]:
        """Take in models; return the fields whose arrays had to grow."""
        new = list({id(m): m for m in models if id(m) not in self._index}.values())
        if not new:
            return []
        for model in new:
            self._check(model)
            self._index[id(model)] = len(self._kept)
            self._kept.append(model)  # an id is good for as long as its model lives
        values = [_values(m) for m in new]
        differing = [
            k for k, v in self._nominal.items() if any(not np.array_equal(v, x[k]) for x in values)
        ]
        first = [k for k in differing if k not in self.rows]
        known = len(self._kept) - len(new)
        for name in first:
            self.rows[name] = (
                torch.from_numpy(self._nominal[name])
                .to(self.device)[None]
                .repeat_interleave(known, 0)
            )
        for name, rows in self.rows.items():
            fresh = torch.from_numpy(np.stack([x[name] for x in values])).to(self.device)
            self.rows[name] = torch.cat([rows, fresh])
        return [*first, *(k for k in _FIELDS if k in self.rows and k not in first)]

    def _check(self, model: mujoco.MjModel) -> None:
        for name, value in _fixed(model).items():
            if not np.array_equal(value, self._fixed[name]):
                raise WarpError(
                    f"tasks differ in {name}, which MuJoCo Warp cannot vary between worlds; use --sim cpu, "
                    "or tasks that share it"
                )

    def lay(self, model: Any) -> None:
        """Hand the height fields of all models to Warp, one after the other."""
        n, count = len(self._kept), self.grounds
        data, size = self.rows.get("hfield_data"), self.rows.get("hfield_size")
        data = _repeated(self._nominal["hfield_data"], n, self.device) if data is None else data
        size = _repeated(self._nominal["hfield_size"], n, self.device) if size is None else size
        nrow, ncol = (self._fixed[k] for k in ("hfield_nrow", "hfield_ncol"))
        ends = np.cumsum(nrow * ncol)
        adr = (np.arange(n)[:, None] * ends[-1] + np.concatenate([[0], ends[:-1]])).ravel()
        model.hfield_data = wp.from_torch(data.flatten().contiguous())
        model.hfield_size = wp.from_torch(size.reshape(n * count, 4).contiguous(), dtype=wp.vec4)
        model.hfield_adr = wp.array(adr.astype(np.int32), dtype=int)
        model.hfield_nrow, model.hfield_ncol = (
            wp.array(np.tile(x, n), dtype=int) for x in (nrow, ncol)
        )

    def point(self, dataid: Tensor, where: Any, rows: Tensor) -> None:
        """Let the height-field geoms of worlds point at their model's own."""
        geoms = np.flatnonzero(self._fixed["geom_type"] == int(mujoco.mjtGeom.mjGEOM_HFIELD))
        first = torch.from_numpy(self._nominal["geom_dataid"][geoms]).to(self.device)
        columns = torch.from_numpy(geoms).to(self.device)
        own = dataid[where]
        own[:, columns] = (rows[:, None] * self.grounds + first).to(own.dtype)
        dataid[where] = own


def _bytes(holder: Any) -> int:
    """Add up the arrays of a structure, and of those in it."""
    parts = [getattr(holder, field.name) for field in dataclasses.fields(holder)]
    arrays = sum(x.capacity for x in parts if isinstance(x, wp.array))
    return int(arrays + sum(_bytes(x) for x in parts if dataclasses.is_dataclass(x)))


def _put(model: mujoco.MjModel) -> Any:
    try:
        return mjw.put_model(model)
    except NotImplementedError as e:
        why = " ".join(str(e).split()).rstrip(".")
        raise WarpError(f"MuJoCo Warp cannot run this robot: {why}; use --sim cpu") from e


def _values(model: mujoco.MjModel) -> dict[str, Any]:
    """Return what may differ between worlds, as Warp lays it out: model and option fields, and
    static geoms' places.
    """
    found = {}
    for kind, holder in ((mjw.Model, model), (mjw.Option, model.opt)):
        for field in dataclasses.fields(kind):
            spec = getattr(field.type, "shape", ())
            if isinstance(spec, tuple) and spec[:1] == _BATCHED and hasattr(holder, field.name):
                found[field.name] = _laid_out(getattr(holder, field.name), field.type)
    if model.nhfield:
        found |= {k: np.asarray(getattr(model, k), np.float32).copy() for k in _FIELDS}
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    still = (model.body_weldid[model.geom_bodyid] == 0)[:, None]
    xpos, xmat = (
        np.where(still, x, 0.0).astype(np.float32) for x in (data.geom_xpos, data.geom_xmat)
    )
    return {**found, "geom_xpos": xpos, "geom_xmat": xmat.reshape(-1, 3, 3)}


def _laid_out(value: Any, spec: Any) -> Any:
    kind = (
        np.float32
        if wp.types.type_is_float(getattr(spec.dtype, "_wp_scalar_type_", spec.dtype))
        else np.int32
    )
    inner = getattr(spec.dtype, "_shape_", ())
    value = np.asarray(value, kind)
    # ("*", "nbody", vec3) is (nbody, 3); ("*", "ngeom", 2, vec3) is (ngeom, 2, 3); ("*", float) a
    # number
    outer = (*value.shape[:1], *(int(n) for n in spec.shape[2:]))[: len(spec.shape) - 1]
    return value.reshape((*outer, *inner)).copy()


def _fixed(model: mujoco.MjModel) -> dict[str, Any]:
    """Return what must not differ: the arrays of whole numbers that Warp shares, and all meshes."""
    meshed = bool((model.geom_type == int(mujoco.mjtGeom.mjGEOM_MESH)).any())
    shared = {}
    for field in dataclasses.fields(mjw.Model):
        spec, name = getattr(field.type, "shape", ()), field.name
        value = getattr(model, name, None)
        varies = (isinstance(spec, tuple) and spec[:1] == _BATCHED) or name in (*_FIELDS, *_UNREAD)
        if (
            isinstance(value, np.ndarray)
            and value.size
            and not varies
            and (meshed or not name.startswith("mesh_"))
        ):
            shared[name] = value.copy()
    return shared


def _repeated(value: Any, n: int, device: str) -> Tensor:
    return torch.from_numpy(value).to(device)[None].expand(n, *value.shape)


def _too_large(worlds: int, error: Exception) -> WarpError:
    why = " ".join(str(error).split())[:120]
    return WarpError(f"{worlds:,} worlds do not fit the device's memory ({why}); use fewer")

"""Physics on a GPU: ``mujoco_warp``, with its memory seen as torch tensors.

It runs on Warp's CPU device too. Numbers are float32.

Every world has a model of its own: the fields in which compiled models differ are arrays over
worlds, everything else is shared. Height fields are kept in a library, into which worlds point.
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
from metarobot.sim.simulator import WorldSelection

try:
    import mujoco_warp as mjw
    import warp as wp
except ImportError as e:
    raise MetarobotError("MuJoCo Warp is not installed: pip install 'metarobot[gpu]'") from e

wp.config.log_level = logging.WARNING

# Fields of MuJoCo Warp's Model declare their shape; one that begins so has a value for each world.
_PER_WORLD = ("*",)
_HEIGHT_FIELD_FIELDS = ("hfield_size", "hfield_data")
"""What the library holds of height fields, a row for each model."""
_STATIC_POSES = ("geom_xpos", "geom_xmat")
"""Where geoms that never move are: Warp computes it once, so it is written where models differ."""
_UNUSED_FIELDS = ("dof_length",)
"""What only the sleeping of bodies reads, which no model here asks for."""
BUFFERS = ("NEFC", "NJMAX_NNZ", "BROADPHASE", "NARROWPHASE", "CCD", "HFIELD", "EPA_HORIZON")
"""Overflows that lose a contact or a constraint, as MuJoCo Warp calls them."""
_OVERFLOW_BITS = sum(
    int(mjw.OverflowType[name]) for name in BUFFERS if name in mjw.OverflowType.__members__
)
OLDEST_CUDA_DRIVER = (12, 4)
"""The first CUDA driver whose graphs can hold loops, as MuJoCo Warp's solver needs."""


class WarpError(MetarobotError):
    """Something that MuJoCo Warp, or this machine, cannot do."""


class BufferSizes(NamedTuple):
    """Sizes of one world's buffers: too small loses contacts, too large costs memory and time."""

    contacts: int
    """Contacts; shared between worlds, so this is what they need on average."""
    constraints: int
    """Rows of the constraint Jacobian; every world has its own."""


def warp_device(name: str) -> Any:
    """Return Warp's device for torch's ``cpu`` or ``cuda``.

    Raises:
        WarpError: There is no CUDA device, or its driver is too old.
    """
    wp.init()
    if name == "cuda" and not wp.is_cuda_available():
        raise WarpError("Warp finds no CUDA device, or a driver too old for it; use --device cpu")
    if name == "cuda" and not wp.is_conditional_graph_supported():
        needed = ".".join(map(str, OLDEST_CUDA_DRIVER))
        found = ".".join(map(str, wp.get_cuda_driver_version()))
        raise WarpError(
            f"MuJoCo Warp needs a CUDA driver of {needed} or newer, not {found}; "
            "update it, or use --sim cpu"
        )
    return wp.get_device("cuda:0" if name == "cuda" else name)


def free_memory(name: str) -> int:
    """Return the bytes that torch's ``cuda`` has free; of the CPU, all that there are."""
    if name == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class WarpSim:
    """Worlds in MuJoCo Warp's arrays.

    ``step`` advances all worlds: of those that were not selected, the state means nothing until
    their next reset. On a GPU the substeps of a control step are one CUDA graph.

    Args:
        models: One model a world.
        device: Warp's device, ``cpu`` or ``cuda``.
        buffer_sizes: Sizes of the contact buffers of a world; Warp's own choice if None.

    Raises:
        WarpError: No such device, a robot that Warp cannot run, or worlds that do not fit.
    """

    def __init__(
        self,
        models: Sequence[mujoco.MjModel],
        *,
        device: str = "cpu",
        buffer_sizes: BufferSizes | None = None,
    ) -> None:
        self._device = warp_device(device)
        self._nominal = models[0]
        self._models: list[mujoco.MjModel] = list(models)
        self._library = _ModelLibrary(models[0], str(wp.device_to_torch(self._device)))
        self._graphs: dict[int, Any] = {}
        """Number of substeps -> the CUDA graph that runs them."""

        sizes = {}
        if buffer_sizes is not None:
            sizes = {"nconmax": buffer_sizes.contacts, "njmax": buffer_sizes.constraints}
        with wp.ScopedDevice(self._device):
            self.model = _put_model(models[0])
            try:
                self.data = mjw.make_data(models[0], nworld=len(models), **sizes)
            except (RuntimeError, MemoryError) as e:
                raise _too_large(len(models), e) from e

        # Overflows are reported by ``overflows``; printing from kernels would stop the device.
        self.model.opt.warn_overflow = 0
        self._overflow = wp.to_torch(self.data.overflow)
        self._overflowed = torch.zeros_like(self._overflow)

        self._fresh = {
            name: self.bind(name).clone() for name in ("time", "act", "qacc_warmstart", "history")
        }
        """State beside qpos and qvel as it is after a reset."""

        self.set_models(models)
        if self._device.is_cuda:  # kernels must be built and loaded before a graph is recorded
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
        return _count_bytes(self.model) + _count_bytes(self.data)

    def register_models(self, models: Sequence[mujoco.MjModel]) -> None:
        """Upload models that worlds will be put on later."""
        for name in self._library.add(models):
            self._widen(name)

    def set_models(
        self, models: Sequence[mujoco.MjModel], ids: Sequence[int] | None = None
    ) -> None:
        """Put each world of ``ids`` (default: all) on its model.

        A model that is registered already costs a gather on the device.
        """
        for world, model in zip(range(self.worlds) if ids is None else ids, models, strict=True):
            self._models[world] = model
        self.register_models(models)

        library = self._library
        rows = torch.tensor([library.row(m) for m in models], device=library.device)
        where: Any = slice(None) if ids is None else torch.tensor(list(ids), device=rows.device)
        for name in library.varied:
            if name not in _HEIGHT_FIELD_FIELDS:
                self._field(name)[where] = library.rows[name][rows]
        if any(name in library.varied for name in _HEIGHT_FIELD_FIELDS):
            library.select_height_fields(self._field("geom_dataid"), where, rows)

    def _widen(self, name: str) -> None:
        """Give a model field a value for each world, or the library's new height fields.

        The graphs were recorded with the old array, so they go.
        """
        self._graphs.clear()
        with wp.ScopedDevice(self._device):
            if name in _HEIGHT_FIELD_FIELDS:
                self._library.upload_height_fields(self.model)
                name = "geom_dataid"
            if name == "geom_dataid" and self.model.geom_dataid.shape[0] == self.worlds:
                return
            if name in _STATIC_POSES:  # in the data, where there is a value for each world anyway
                return

            # All worlds begin with the nominal value; ``set_models`` writes their own.
            holder = self.model.opt if hasattr(self.model.opt, name) else self.model
            shared = getattr(holder, name)
            wide = wp.empty((self.worlds, *shared.shape[1:]), dtype=shared.dtype)
            wp.to_torch(wide).copy_(wp.to_torch(shared)[:1].expand_as(wp.to_torch(wide)))
            wide._is_batched = True
            setattr(holder, name, wide)

    def _field(self, name: str) -> Tensor:
        """Return a model field over the worlds, or the poses of static geoms, ``(world, ...)``."""
        holder = next(h for h in (self.data, self.model.opt, self.model) if hasattr(h, name))
        view: Tensor = wp.to_torch(getattr(holder, name))
        return view

    def bind(self, field: str) -> Tensor:
        """Return the simulator's own tensor ``(world, ...)`` of an ``MjData`` field, float32."""
        tensor: Tensor = wp.to_torch(getattr(self.data, field))
        return tensor

    def step(self, substeps: int, rows: WorldSelection | None = None) -> Tensor:
        """Advance all worlds; return ``(world,)``, true where the physics broke down.

        It broke down where the state is not finite or a buffer overflowed. Overflows in worlds
        that are not in ``rows`` are not counted. Nothing is read back.
        """
        with wp.ScopedDevice(self._device):
            if not self._device.is_cuda:
                self._advance(substeps)
            else:
                # Launching one graph costs less than launching hundreds of kernels.
                if substeps not in self._graphs:
                    with wp.ScopedCapture() as capture:
                        self._advance(substeps)
                    self._graphs[substeps] = capture.graph
                wp.capture_launch(self._graphs[substeps])

        overflow = self._overflow & _OVERFLOW_BITS
        # Physics that has lost a contact is wrong, though the state may still look right.
        lost_contacts = overflow != 0
        if rows is not None:
            lost_contacts &= self._mask(rows)
        self._overflowed |= torch.where(lost_contacts, overflow, 0)
        self._overflow.zero_()

        finite = torch.isfinite(self.bind("qpos").sum(1) + self.bind("qvel").sum(1))
        broken: Tensor = ~finite | lost_contacts
        return broken

    def _mask(self, rows: WorldSelection) -> Tensor:
        if isinstance(rows, Tensor):
            return rows
        mask = torch.zeros_like(self._overflow, dtype=torch.bool)
        return mask.index_fill_(0, torch.tensor(list(rows), device=mask.device), True)

    def _advance(self, substeps: int) -> None:
        for _ in range(substeps):
            mjw.step(self.model, self.data)

    def overflows(self) -> dict[str, int]:
        """Count the worlds in which each buffer overflowed since the last call.

        Only buffers that did are in the result. This reads from the device.
        """
        bits = self._overflowed.clone().cpu()
        self._overflowed.zero_()
        counts = {name: int(((bits & int(mjw.OverflowType[name])) != 0).sum()) for name in BUFFERS}
        return {name: n for name, n in counts.items() if n}

    def reset(self, qpos: Tensor, qvel: Tensor, rows: WorldSelection | None = None) -> None:
        """Put worlds (default: all) into a fresh state with these joint positions and velocities.

        ``qpos`` and ``qvel`` have a row for each number of ``rows``; with a mask, one for each
        world there is. Sensors of position and velocity are current afterwards, those of forces
        zero.
        """
        mask = None if rows is None else self._mask(rows)
        if rows is not None and not isinstance(rows, Tensor):
            ids = torch.tensor(list(rows), device=self._overflow.device)
            qpos = self.bind("qpos").index_copy(0, ids, qpos.float())
            qvel = self.bind("qvel").index_copy(0, ids, qvel.float())
        self._write_state(qpos, qvel, mask)
        if self._nominal.nsensordata:
            self._update_sensors(mask)

    def park(self, qpos: Tensor, qvel: Tensor, mask: Tensor) -> None:
        """Put the worlds of a mask ``(world,)`` into a state in which they may wait.

        It is ``reset`` without new sensor values: cheap enough for every step.
        """
        self._write_state(qpos, qvel, mask)

    def _write_state(self, qpos: Tensor, qvel: Tensor, mask: Tensor | None) -> None:
        """Write a fresh state, a row for each world, where the mask holds (None: everywhere)."""
        for name, value in {"qpos": qpos, "qvel": qvel, **self._fresh}.items():
            tensor = self.bind(name)
            if mask is None:
                tensor.copy_(value)
            else:
                column = mask.view(-1, *[1] * (tensor.dim() - 1))
                tensor.copy_(torch.where(column, value, tensor))

    def _update_sensors(self, mask: Tensor | None) -> None:
        """Compute sensors as ``mj_forward`` does up to velocities, where the mask holds."""
        sensors = self.bind("sensordata")
        # The kernels run over all worlds; those that go on keep the values of their last step.
        before = None if mask is None else sensors.clone()
        sensors.zero_()
        with wp.ScopedDevice(self._device):
            mjw.fwd_position(self.model, self.data)
            mjw.sensor_pos(self.model, self.data)
            mjw.fwd_velocity(self.model, self.data)
            mjw.sensor_vel(self.model, self.data)
        if mask is not None and before is not None:
            sensors.copy_(torch.where(mask[:, None], sensors, before))

    def snapshot(self, world: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """Return one world's model and a copy of its data, with forward kinematics computed."""
        model = self._models[world]
        data = mujoco.MjData(model)
        for name in ("qpos", "qvel", "act", "ctrl"):
            getattr(data, name)[:] = self.bind(name)[world].cpu().numpy()
        mujoco.mj_forward(model, data)
        return model, data


class _ModelLibrary:
    """The values of all registered models, of the fields in which they differ."""

    def __init__(self, nominal: mujoco.MjModel, device: str) -> None:
        self.device = device
        self.rows: dict[str, Tensor] = {}
        """Field -> its values ``(model, ...)``."""
        self._index: dict[int, int] = {}
        """id of a model -> its row."""
        self._models: list[mujoco.MjModel] = []
        self._nominal = _varying_values(nominal)
        self._shared = _shared_values(nominal)
        self._height_fields = nominal.nhfield

    @property
    def varied(self) -> Iterable[str]:
        """Names of the fields in which models differ."""
        return self.rows.keys()

    def row(self, model: mujoco.MjModel) -> int:
        """Return the row of a model that was added."""
        return self._index[id(model)]

    def add(self, models: Sequence[mujoco.MjModel]) -> list[str]:
        """Add models that are new; return the fields whose arrays had to grow.

        Raises:
            WarpError: A model differs in what Warp cannot vary between worlds.
        """
        new = list({id(m): m for m in models if id(m) not in self._index}.values())
        if not new:
            return []

        known = len(self._models)
        for model in new:
            self._check(model)
            self._index[id(model)] = len(self._models)
            self._models.append(model)  # kept, as an id is good only while its model exists

        # A field gets an array when a model first differs in it; older models have the nominal.
        values = [_varying_values(m) for m in new]
        differing = [
            name
            for name, value in self._nominal.items()
            if any(not np.array_equal(value, v[name]) for v in values)
        ]
        first = [name for name in differing if name not in self.rows]
        for name in first:
            nominal = torch.from_numpy(self._nominal[name]).to(self.device)
            self.rows[name] = nominal[None].repeat_interleave(known, 0)
        for name, rows in self.rows.items():
            added = torch.from_numpy(np.stack([v[name] for v in values])).to(self.device)
            self.rows[name] = torch.cat([rows, added])

        grown = [n for n in _HEIGHT_FIELD_FIELDS if n in self.rows and n not in first]
        return [*first, *grown]

    def _check(self, model: mujoco.MjModel) -> None:
        for name, value in _shared_values(model).items():
            if not np.array_equal(value, self._shared[name]):
                raise WarpError(
                    f"tasks differ in {name}, which MuJoCo Warp cannot vary between worlds; "
                    "use --sim cpu, or tasks that share it"
                )

    def upload_height_fields(self, model: Any) -> None:
        """Give Warp's model the height fields of all registered models, one after the other."""
        data = self._all_rows("hfield_data")
        size = self._all_rows("hfield_size")
        nrow = self._shared["hfield_nrow"]
        ncol = self._shared["hfield_ncol"]

        # Where each height field begins in the joined data, model by model.
        count = len(self._models)
        ends = np.cumsum(nrow * ncol)
        begins = np.concatenate([[0], ends[:-1]])
        address = (np.arange(count)[:, None] * ends[-1] + begins).ravel()

        sizes = size.reshape(count * self._height_fields, 4).contiguous()
        model.hfield_data = wp.from_torch(data.flatten().contiguous())
        model.hfield_size = wp.from_torch(sizes, dtype=wp.vec4)
        model.hfield_adr = wp.array(address.astype(np.int32), dtype=int)
        model.hfield_nrow = wp.array(np.tile(nrow, count), dtype=int)
        model.hfield_ncol = wp.array(np.tile(ncol, count), dtype=int)

    def _all_rows(self, name: str) -> Tensor:
        """Return the values of a field for all models ``(model, ...)``, also if they are equal."""
        if name in self.rows:
            return self.rows[name]
        nominal = torch.from_numpy(self._nominal[name]).to(self.device)
        return nominal[None].expand(len(self._models), *nominal.shape)

    def select_height_fields(self, dataid: Tensor, where: Any, rows: Tensor) -> None:
        """Make the height-field geoms of worlds use those of the models in these rows.

        ``dataid`` ``(world, geom)`` is written at the worlds ``where``.
        """
        is_height_field = self._shared["geom_type"] == int(mujoco.mjtGeom.mjGEOM_HFIELD)
        geoms = np.flatnonzero(is_height_field)
        own = torch.from_numpy(self._nominal["geom_dataid"][geoms]).to(self.device)
        columns = torch.from_numpy(geoms).to(self.device)

        selected = dataid[where]
        selected[:, columns] = (rows[:, None] * self._height_fields + own).to(selected.dtype)
        dataid[where] = selected


def _count_bytes(holder: Any) -> int:
    """Add up the arrays of a structure, and of the structures in it."""
    parts = [getattr(holder, field.name) for field in dataclasses.fields(holder)]
    arrays = sum(part.capacity for part in parts if isinstance(part, wp.array))
    return int(arrays + sum(_count_bytes(p) for p in parts if dataclasses.is_dataclass(p)))


def _put_model(model: mujoco.MjModel) -> Any:
    try:
        return mjw.put_model(model)
    except NotImplementedError as e:
        reason = " ".join(str(e).split()).rstrip(".")
        raise WarpError(f"MuJoCo Warp cannot run this robot: {reason}; use --sim cpu") from e


def _has_value_per_world(field: Any) -> bool:
    shape = getattr(field.type, "shape", ())
    return isinstance(shape, tuple) and shape[:1] == _PER_WORLD


def _varying_values(model: mujoco.MjModel) -> dict[str, Any]:
    """Return what may differ between worlds, laid out as Warp has it.

    These are fields of the model and of its options, and the poses of static geoms.
    """
    values = {}
    for structure, holder in ((mjw.Model, model), (mjw.Option, model.opt)):
        for field in dataclasses.fields(structure):
            if _has_value_per_world(field) and hasattr(holder, field.name):
                values[field.name] = _in_warp_layout(getattr(holder, field.name), field.type)
    if model.nhfield:
        for name in _HEIGHT_FIELD_FIELDS:
            values[name] = np.asarray(getattr(model, name), np.float32).copy()

    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    static = (model.body_weldid[model.geom_bodyid] == 0)[:, None]
    values["geom_xpos"] = np.where(static, data.geom_xpos, 0.0).astype(np.float32)
    xmat = np.where(static, data.geom_xmat, 0.0).astype(np.float32)
    values["geom_xmat"] = xmat.reshape(-1, 3, 3)
    return values


def _in_warp_layout(value: Any, array_type: Any) -> Any:
    """Return MuJoCo's value with the number type and shape of Warp's array, without the world."""
    scalar = getattr(array_type.dtype, "_wp_scalar_type_", array_type.dtype)
    value = np.asarray(value, np.float32 if wp.types.type_is_float(scalar) else np.int32)

    # ("*", "nbody", vec3) is (nbody, 3), ("*", "ngeom", 2, vec3) is (ngeom, 2, 3), and ("*", float)
    # is a number.
    inner = getattr(array_type.dtype, "_shape_", ())
    outer = (*value.shape[:1], *(int(n) for n in array_type.shape[2:]))
    outer = outer[: len(array_type.shape) - 1]
    return value.reshape((*outer, *inner)).copy()


def _shared_values(model: mujoco.MjModel) -> dict[str, Any]:
    """Return what must not differ between worlds: the arrays that Warp shares, with all meshes."""
    has_meshes = bool((model.geom_type == int(mujoco.mjtGeom.mjGEOM_MESH)).any())
    shared = {}
    for field in dataclasses.fields(mjw.Model):
        name = field.name
        value = getattr(model, name, None)
        if not isinstance(value, np.ndarray) or not value.size:
            continue
        if _has_value_per_world(field) or name in (*_HEIGHT_FIELD_FIELDS, *_UNUSED_FIELDS):
            continue
        if name.startswith("mesh_") and not has_meshes:
            continue
        shared[name] = value.copy()
    return shared


def _too_large(worlds: int, error: Exception) -> WarpError:
    reason = " ".join(str(error).split())[:120]
    return WarpError(f"{worlds:,} worlds do not fit the device's memory ({reason}); use fewer")

//! Tensors as Python hands them over: address, shape, strides and dtype, checked again before they are borrowed.

use half::{bf16, f16};
use pyo3::{FromPyObject, Py, PyAny};

use crate::error::{Error, Result};
use crate::tensor::span;
use crate::{Bias, BiasData, BiasGradient, Mask, Tensor, TensorMut};

/// Element types, numbered as in `mra_attention._native`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dtype {
    F32,
    F64,
    Bf16,
    F16,
    Byte,
    I32,
}

/// A type of elements that a descriptor can be borrowed as.
pub(super) trait Stored {
    const DTYPE: Dtype;
}

impl Stored for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl Stored for f64 {
    const DTYPE: Dtype = Dtype::F64;
}
impl Stored for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}
impl Stored for f16 {
    const DTYPE: Dtype = Dtype::F16;
}
impl Stored for u8 {
    const DTYPE: Dtype = Dtype::Byte;
}
impl Stored for i32 {
    const DTYPE: Dtype = Dtype::I32;
}

/// `(data_ptr, shape, strides in elements, dtype, tensor)`. The tensor is there to be kept alive.
#[derive(FromPyObject)]
pub(super) struct Descriptor(
    usize,
    Vec<usize>,
    Vec<usize>,
    u8,
    #[expect(dead_code, reason = "it is there to be kept alive")] Py<PyAny>,
);

impl Descriptor {
    pub(super) fn dtype(&self) -> Result<Dtype> {
        const CODES: [Dtype; 6] = [Dtype::F32, Dtype::F64, Dtype::Bf16, Dtype::F16, Dtype::Byte, Dtype::I32];
        let code = CODES.get(usize::from(self.3)).copied();
        code.ok_or_else(|| Error::new(format!("dtype code: {}, expected 0 to {}", self.3, CODES.len() - 1)))
    }

    /// The shape of a four-dimensional tensor.
    pub(super) fn shape(&self, name: &str) -> Result<[usize; 4]> {
        self.dims(name).map(|(shape, _)| shape)
    }

    fn dims<const N: usize>(&self, name: &str) -> Result<([usize; N], [usize; N])> {
        let (shape, strides) = (self.1.as_slice().try_into(), self.2.as_slice().try_into());
        match (shape, strides) {
            (Ok(shape), Ok(strides)) => Ok((shape, strides)),
            _ => Err(Error::new(format!("{name}: shape {:?} and strides {:?}, expected {N} dimensions", self.1, self.2))),
        }
    }

    /// The memory from the first element to the last one, in elements.
    fn elements<E: Stored>(&self, name: &str) -> Result<(*mut E, usize)> {
        let dtype = self.dtype()?;
        if dtype != E::DTYPE {
            return Err(Error::new(format!("{name}: dtype {dtype:?}, expected {:?}", E::DTYPE)));
        }
        let len = span(&self.1, &self.2)
            .filter(|&len| len.checked_mul(size_of::<E>()).is_some_and(|bytes| isize::try_from(bytes).is_ok()));
        let Some(len) = len.filter(|_| self.1.len() == self.2.len()) else {
            return Err(Error::new(format!("{name}: shape {:?} and strides {:?} do not make a tensor", self.1, self.2)));
        };
        if len == 0 {
            return Ok((std::ptr::dangling_mut(), 0));
        }
        let data = self.0 as *mut E;
        if data.is_null() || !data.is_aligned() {
            return Err(Error::new(format!("{name}: address {:#x}, expected memory of {len} aligned elements", self.0)));
        }
        Ok((data, len))
    }

    /// Borrows the memory for reading.
    ///
    /// # Safety
    /// - The memory belongs to a live tensor of this description, and nothing writes to it while it is borrowed.
    unsafe fn slice<'a, E: Stored>(&self, name: &str) -> Result<&'a [E]> {
        let (data, len) = self.elements::<E>(name)?;
        // SAFETY: not null, aligned, of a length that fits; the rest is the caller's.
        Ok(unsafe { std::slice::from_raw_parts(data, len) })
    }

    /// Borrows the memory for writing.
    ///
    /// # Safety
    /// - The memory belongs to a live tensor of this description, and nothing else uses it while it is borrowed.
    unsafe fn slice_mut<'a, E: Stored>(&self, name: &str) -> Result<&'a mut [E]> {
        let (data, len) = self.elements::<E>(name)?;
        // SAFETY: not null, aligned, of a length that fits; the rest is the caller's.
        Ok(unsafe { std::slice::from_raw_parts_mut(data, len) })
    }

    /// A tensor `(B, H, L, D)`.
    ///
    /// # Safety
    /// - As [`Self::slice`].
    pub(super) unsafe fn tensor<'a, E: Stored>(&self, name: &str) -> Result<Tensor<'a, E>> {
        let (shape, strides) = self.dims(name)?;
        // SAFETY: the caller's.
        Tensor::new(name, unsafe { self.slice(name) }?, shape, strides)
    }

    /// A tensor `(B, H, L)` as `(B, H, L, 1)`.
    ///
    /// # Safety
    /// - As [`Self::slice`].
    pub(super) unsafe fn rows<'a, E: Stored>(&self, name: &str) -> Result<Tensor<'a, E>> {
        let ([b, h, l], [sb, sh, sl]) = self.dims(name)?;
        // SAFETY: the caller's.
        Tensor::new(name, unsafe { self.slice(name) }?, [b, h, l, 1], [sb, sh, sl, 1])
    }

    /// A tensor `(B, H, L, D)` to write.
    ///
    /// # Safety
    /// - As [`Self::slice_mut`].
    pub(super) unsafe fn tensor_mut<'a, E: Stored>(&self, name: &str) -> Result<TensorMut<'a, E>> {
        let (shape, strides) = self.dims(name)?;
        // SAFETY: the caller's.
        TensorMut::new(name, unsafe { self.slice_mut(name) }?, shape, strides)
    }

    /// A tensor `(B, H, L)` to write, as `(B, H, L, 1)`.
    ///
    /// # Safety
    /// - As [`Self::slice_mut`].
    pub(super) unsafe fn rows_mut<'a, E: Stored>(&self, name: &str) -> Result<TensorMut<'a, E>> {
        let ([b, h, l], [sb, sh, sl]) = self.dims(name)?;
        // SAFETY: the caller's.
        TensorMut::new(name, unsafe { self.slice_mut(name) }?, [b, h, l, 1], [sb, sh, sl, 1])
    }

    /// A mask `(B, L)`.
    ///
    /// # Safety
    /// - As [`Self::slice`].
    pub(super) unsafe fn mask<'a>(&self, name: &str) -> Result<Mask<'a>> {
        let (shape, strides) = self.dims(name)?;
        // SAFETY: the caller's.
        Mask::new(name, unsafe { self.slice(name) }?, shape, strides)
    }

    /// A mask or bias of the pairs `(B, H, Lq, Lk)`, or with `tiles` a grid of them.
    ///
    /// # Safety
    /// - As [`Self::slice`], for both.
    pub(super) unsafe fn bias<'a>(&self, name: &str, pairs: [usize; 4], tiles: Option<&Self>) -> Result<Bias<'a>> {
        let (shape, strides) = self.dims(name)?;
        if let Some(tiles) = tiles {
            let ([_, height, width], _) = tiles.dims::<3>("mask_tiles")?;
            // SAFETY: the caller's.
            let (grid, tiles) = unsafe { (self.slice(name)?, tiles.contiguous("mask_tiles")?) };
            let block = [height, width];
            let expected = [pairs[0], pairs[1], pairs[2].div_ceil(height.max(1)), pairs[3].div_ceil(width.max(1))];
            if shape != expected {
                return Err(Error::new(format!(
                    "{name}: a grid of shape {shape:?}, expected {expected:?} for blocks of {block:?}"
                )));
            }
            return Bias::new(name, BiasData::Tiles { grid, tiles, block }, pairs, strides);
        }
        // SAFETY: the caller's.
        let data = unsafe {
            match self.dtype()? {
                Dtype::F32 => BiasData::F32(self.slice(name)?),
                Dtype::F64 => BiasData::F64(self.slice(name)?),
                Dtype::Bf16 => BiasData::Bf16(self.slice(name)?),
                Dtype::F16 => BiasData::F16(self.slice(name)?),
                Dtype::Byte => BiasData::Bool(self.slice(name)?),
                Dtype::I32 => return Err(Error::new(format!("{name}: dtype int32, expected bool or a floating point type"))),
            }
        };
        Bias::new(name, data, shape, strides)
    }

    /// The gradient of a bias.
    ///
    /// # Safety
    /// - As [`Self::slice_mut`].
    pub(super) unsafe fn bias_gradient<'a>(&self, name: &str) -> Result<BiasGradient<'a>> {
        // SAFETY: the caller's.
        unsafe {
            Ok(match self.dtype()? {
                Dtype::F32 => BiasGradient::F32(self.tensor_mut(name)?),
                Dtype::F64 => BiasGradient::F64(self.tensor_mut(name)?),
                Dtype::Bf16 => BiasGradient::Bf16(self.tensor_mut(name)?),
                Dtype::F16 => BiasGradient::F16(self.tensor_mut(name)?),
                dtype => return Err(Error::new(format!("{name}: dtype {dtype:?}, expected a floating point type"))),
            })
        }
    }

    /// Contiguous elements of any shape.
    ///
    /// # Safety
    /// - As [`Self::slice`].
    pub(super) unsafe fn contiguous<'a, E: Stored>(&self, name: &str) -> Result<&'a [E]> {
        self.check_contiguous(name)?;
        // SAFETY: the caller's.
        unsafe { self.slice(name) }
    }

    /// Contiguous elements of any shape, to write.
    ///
    /// # Safety
    /// - As [`Self::slice_mut`].
    pub(super) unsafe fn contiguous_mut<'a, E: Stored>(&self, name: &str) -> Result<&'a mut [E]> {
        self.check_contiguous(name)?;
        // SAFETY: the caller's.
        unsafe { self.slice_mut(name) }
    }

    fn check_contiguous(&self, name: &str) -> Result<()> {
        let count = self.1.iter().try_fold(1usize, |count, &n| count.checked_mul(n));
        if count.is_some() && count == span(&self.1, &self.2) {
            return Ok(());
        }
        Err(Error::new(format!("{name}: shape {:?} with strides {:?}, expected a contiguous tensor", self.1, self.2)))
    }

    /// The addresses from the first byte to behind the last one.
    fn addresses(&self) -> std::ops::Range<usize> {
        let size = match self.dtype() {
            Ok(Dtype::F32 | Dtype::I32) => 4,
            Ok(Dtype::Bf16 | Dtype::F16) => 2,
            Ok(Dtype::Byte) => 1,
            // An unknown one is refused where the tensor is borrowed.
            Ok(Dtype::F64) | Err(_) => 8,
        };
        let bytes = span(&self.1, &self.2).and_then(|len| len.checked_mul(size)).unwrap_or(0);
        self.0..self.0.saturating_add(bytes)
    }
}

/// A tensor with the name of its argument.
pub(super) type Named<'a> = (&'a str, &'a Descriptor);

/// Checks that no output shares memory with an input or another output.
pub(super) fn check_disjoint(outputs: &[Named<'_>], inputs: &[Named<'_>]) -> Result<()> {
    for (index, (name, output)) in outputs.iter().enumerate() {
        for (other_name, other) in outputs[index + 1..].iter().chain(inputs) {
            let (a, b) = (output.addresses(), other.addresses());
            if !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end {
                return Err(Error::new(format!("{name}: shares memory with {other_name}, expected a tensor of its own")));
            }
        }
    }
    Ok(())
}

//! Masks and biases as the caller has them, and how rows of them are read.

use std::ops::Range;

use half::{bf16, f16};

use super::blocks::Blocks;
use crate::error::{Error, Result};
use crate::simd::{Element, Scalar};
use crate::tensor::span;

/// Which tokens of each sequence of a batch count.
#[derive(Debug, Clone, Copy)]
pub struct Mask<'a> {
    valid: &'a [u8],
    pub(crate) shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Mask<'a> {
    /// A view of bytes, batch by token; a token is valid where the byte is not 0.
    ///
    /// # Errors
    /// If shape and strides reach beyond `valid`. `name` is the argument in the message.
    pub fn new(name: &str, valid: &'a [u8], shape: [usize; 2], strides: [usize; 2]) -> Result<Self> {
        match span(&shape, &strides) {
            Some(needed) if needed <= valid.len() => Ok(Self { valid, shape, strides }),
            _ => Err(Error::new(format!(
                "{name}: shape {shape:?} with strides {strides:?} reaches beyond its {} bytes",
                valid.len()
            ))),
        }
    }

    /// Whether a token counts.
    pub(crate) fn is_valid(&self, item: usize, token: usize) -> bool {
        self.valid[item * self.strides[0] + token * self.strides[1]] != 0
    }
}

/// The elements of a [`Bias`].
#[derive(Debug, Clone, Copy)]
pub enum BiasData<'a> {
    /// A mask: a key is visible where the byte is not 0.
    Bool(&'a [u8]),
    /// A mask of blocks, for each of which the grid says what is visible: -1 nothing, -2 all, and n >= 0 what tile n of `tiles` says,
    /// `block[0]` rows of `block[1]` bytes. Strides are those of the grid.
    Tiles {
        /// Batch, head, block of queries, block of keys.
        grid: &'a [i32],
        /// Tile by tile, without gaps.
        tiles: &'a [u8],
        /// Queries and keys of a block.
        block: [usize; 2],
    },
    /// Added to the logits.
    F32(&'a [f32]),
    /// Added to the logits.
    F64(&'a [f64]),
    /// Added to the logits.
    Bf16(&'a [bf16]),
    /// Added to the logits.
    F16(&'a [f16]),
}

/// The byte of a pair whose logit changes by a bias. Other visible ones have 1, or whatever a mask has.
pub(super) const BIASED: u8 = 2;

/// A mask or an additive bias of every pair: batch, head, query, key. `-inf` is a mask.
#[derive(Debug, Clone, Copy)]
pub struct Bias<'a> {
    pub(super) data: BiasData<'a>,
    pub(crate) shape: [usize; 4],
    pub(super) strides: [usize; 4],
}

impl<'a> Bias<'a> {
    /// A view of `data` of shape `(B, H, Lq, Lk)`; a stride of 0 repeats it.
    ///
    /// # Errors
    /// If shape and strides reach beyond `data`, or a grid names a tile that is not there. `name` is the argument in the message.
    pub fn new(name: &str, data: BiasData<'a>, shape: [usize; 4], strides: [usize; 4]) -> Result<Self> {
        let (stored, len) = match data {
            BiasData::Tiles { grid, tiles, block } => {
                let size = block[0].checked_mul(block[1]).filter(|&size| size > 0);
                let size = size.ok_or_else(|| Error::new(format!("{name}: blocks of {block:?}, expected positive sizes")))?;
                if let Some(tile) =
                    grid.iter().find(|&&tile| usize::try_from(tile).map_or(tile < -2, |n| n >= tiles.len() / size))
                {
                    return Err(Error::new(format!(
                        "{name}: tile {tile}, expected -2, -1 or one of {} tiles",
                        tiles.len() / size
                    )));
                }
                ([shape[0], shape[1], shape[2].div_ceil(block[0]), shape[3].div_ceil(block[1])], grid.len())
            }
            BiasData::Bool(data) => (shape, data.len()),
            BiasData::F32(data) => (shape, data.len()),
            BiasData::F64(data) => (shape, data.len()),
            BiasData::Bf16(data) => (shape, data.len()),
            BiasData::F16(data) => (shape, data.len()),
        };
        match span(&stored, &strides) {
            Some(needed) if needed <= len => Ok(Self { data, shape, strides }),
            _ => {
                Err(Error::new(format!("{name}: shape {stored:?} with strides {strides:?} reaches beyond its {len} elements")))
            }
        }
    }

    /// Whether it is added to logits, rather than a mask.
    pub(crate) fn is_additive(&self) -> bool {
        !matches!(self.data, BiasData::Bool(_) | BiasData::Tiles { .. })
    }

    /// Whether all queries have the same.
    pub(crate) fn is_same_for_queries(&self) -> bool {
        self.strides[2] == 0 && !matches!(self.data, BiasData::Tiles { .. })
    }

    /// How many heads of a batch item have a mask of their own.
    pub(crate) fn distinct_heads(&self) -> usize {
        if self.strides[1] == 0 { self.shape[1].min(1) } else { self.shape[1] }
    }

    /// Whether it is the same along each dimension.
    pub(crate) fn is_repeated(&self) -> [bool; 4] {
        std::array::from_fn(|dim| self.strides[dim] == 0 || self.shape[dim] <= 1)
    }

    /// Whether all batch items have the same.
    pub(crate) fn is_same_for_items(&self) -> bool {
        self.strides[0] == 0
    }

    /// Where the elements of one query start.
    pub(super) fn start(&self, [batch, head, query]: [usize; 3]) -> usize {
        batch * self.strides[0] + head * self.strides[1] + query * self.strides[2]
    }

    /// Writes the bias of one query on the keys with these numbers; of a mask 0, or `-inf` where it hides the key.
    pub(crate) fn read<T: Scalar>(&self, place: [usize; 3], keys: &Blocks, numbers: Range<usize>, to: &mut [T]) {
        if numbers.is_empty() {
            return;
        }
        let step = self.strides[3];
        let hide = |byte: u8| if byte == 0 { T::NEG_INFINITY } else { T::ZERO };
        match self.data {
            BiasData::Bool(data) => gather(&data[self.start(place)..], step, keys, numbers, to, |&byte| hide(byte)),
            BiasData::Tiles { .. } => {
                let mut bytes = vec![0; numbers.len()];
                self.read_tiles(place, keys, numbers, &mut bytes);
                to.iter_mut().zip(bytes).for_each(|(to, byte)| *to = hide(byte));
            }
            BiasData::F32(data) => {
                gather(&data[self.start(place)..], step, keys, numbers, to, |&x| T::from_f64(f64::from(x)));
            }
            BiasData::F64(data) => gather(&data[self.start(place)..], step, keys, numbers, to, |&x| T::from_f64(x)),
            BiasData::Bf16(data) => gather_half(data, self.start(place), step, keys, numbers, to),
            BiasData::F16(data) => gather_half(data, self.start(place), step, keys, numbers, to),
        }
    }

    /// The keys with these numbers that one query sees: a byte for each, 0 where it is hidden. Of a bias it is [`BIASED`] where that is
    /// neither 0 nor `-inf`.
    pub(crate) fn visible<'s>(
        &'s self,
        place: [usize; 3],
        keys: &Blocks,
        numbers: Range<usize>,
        scratch: &'s mut Vec<u8>,
    ) -> &'s [u8] {
        scratch.clear();
        scratch.resize(numbers.len(), 0);
        if numbers.is_empty() {
            return scratch;
        }
        match self.data {
            BiasData::Bool(data) => {
                let start = self.start(place);
                if let Some(row) = in_place(data, start, self.strides[3], keys, numbers.clone()) {
                    return row;
                }
                gather(&data[start..], self.strides[3], keys, numbers, scratch, |&byte| byte);
            }
            BiasData::Tiles { .. } => self.read_tiles(place, keys, numbers, scratch),
            BiasData::F64(data) => self.classify(data, place, keys, numbers, scratch, [0.0, f64::NEG_INFINITY]),
            BiasData::F32(data) => self.classify(data, place, keys, numbers, scratch, [0.0, f32::NEG_INFINITY]),
            BiasData::Bf16(data) => self.classify(data, place, keys, numbers, scratch, [bf16::ZERO, bf16::NEG_INFINITY]),
            BiasData::F16(data) => self.classify(data, place, keys, numbers, scratch, [f16::ZERO, f16::NEG_INFINITY]),
        }
        scratch
    }

    fn classify<E: PartialEq>(
        &self,
        data: &[E],
        place: [usize; 3],
        keys: &Blocks,
        numbers: Range<usize>,
        to: &mut [u8],
        [zero, hidden]: [E; 2],
    ) {
        let byte = |x: &E| {
            if *x == hidden {
                0
            } else if *x == zero {
                1
            } else {
                BIASED
            }
        };
        gather(&data[self.start(place)..], self.strides[3], keys, numbers, to, byte);
    }

    /// Writes the bytes of the mask of one query on the keys with these numbers, a run of keys in one block of the grid at a time.
    fn read_tiles(&self, [batch, head, query]: [usize; 3], keys: &Blocks, numbers: Range<usize>, to: &mut [u8]) {
        let BiasData::Tiles { grid, tiles, block: [height, width] } = self.data else { return };
        let row = self.start([batch, head, query / height]);
        let mut number = numbers.start;
        while number < numbers.end {
            let key = keys.token(number);
            let longest = (width - key % width).min(numbers.end - number);
            let run = if keys.consecutive(number..number + longest) { longest } else { 1 };
            let cell = grid[row + key / width * self.strides[3]];
            let to = &mut to[number - numbers.start..][..run];
            match usize::try_from(cell) {
                Ok(tile) => to.copy_from_slice(&tiles[(tile * height + query % height) * width + key % width..][..run]),
                Err(_) => to.fill(u8::from(cell == -2)),
            }
            number += run;
        }
    }

    /// Whether a grid says the same for two queries, without a look at tiles.
    pub(super) fn is_same_row(&self, [batch, head, query]: [usize; 3], other: usize) -> bool {
        let BiasData::Tiles { grid, block: [height, width], .. } = self.data else { return false };
        let row = self.start([batch, head, query / height]);
        query / height == other / height
            && (0..self.shape[3].div_ceil(width)).all(|column| grid[row + column * self.strides[3]] < 0)
    }

    /// What a grid says of all keys with these numbers at once, if they lie in one of its blocks and it is no tile.
    pub(super) fn whole_block(&self, [batch, head, query]: [usize; 3], keys: &Blocks, numbers: Range<usize>) -> Option<bool> {
        let BiasData::Tiles { grid, block: [height, width], .. } = self.data else { return None };
        let columns = keys.token(numbers.start) / width..keys.token(numbers.end - 1) / width + 1;
        let cell = grid[self.start([batch, head, query / height]) + columns.start * self.strides[3]];
        (columns.len() == 1 && cell < 0).then_some(cell == -2)
    }
}

/// As [`gather`], by whole vectors where the elements lie together.
fn gather_half<E: Element<Compute = f32>, T: Scalar>(
    data: &[E],
    start: usize,
    step: usize,
    keys: &Blocks,
    numbers: Range<usize>,
    to: &mut [T],
) {
    let mut wide = [0.0; 64];
    if let Some(row) = in_place(data, start, step, keys, numbers.clone()) {
        for (to, from) in to.chunks_mut(wide.len()).zip(row.chunks(wide.len())) {
            let wide = &mut wide[..from.len()];
            E::widen(from, wide);
            to.iter_mut().zip(wide).for_each(|(to, x)| *to = T::from_f64(f64::from(*x)));
        }
    } else {
        gather(&data[start..], step, keys, numbers, to, |x| {
            E::widen(std::slice::from_ref(x), &mut wide[..1]);
            T::from_f64(f64::from(wide[0]))
        });
    }
}

/// Converts the elements of the keys with these numbers, `step` apart.
#[inline(always)]
pub(super) fn gather<E, T>(
    data: &[E],
    step: usize,
    keys: &Blocks,
    numbers: Range<usize>,
    to: &mut [T],
    mut value: impl FnMut(&E) -> T,
) {
    if numbers.is_empty() {
        return;
    }
    if step == 1 && keys.consecutive(numbers.clone()) {
        for (to, from) in to.iter_mut().zip(&data[keys.token(numbers.start)..][..numbers.len()]) {
            *to = value(from);
        }
    } else {
        for (to, number) in to.iter_mut().zip(numbers) {
            *to = value(&data[keys.token(number) * step]);
        }
    }
}

/// The elements of the keys with these numbers, if they lie together.
pub(super) fn in_place<'a, E>(
    data: &'a [E],
    start: usize,
    step: usize,
    keys: &Blocks,
    numbers: Range<usize>,
) -> Option<&'a [E]> {
    if numbers.is_empty() {
        return Some(&[]);
    }
    (step == 1 && keys.consecutive(numbers.clone())).then(|| &data[start + keys.token(numbers.start)..][..numbers.len()])
}

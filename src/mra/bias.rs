//! Masks and biases that depend on the query: what they make of each block (docs/definitions.md, section 5).
//!
//! ```text
//! for each block (i, j), over its pairs of a valid query and a valid key:
//!     none visible            dead    neither exact nor coarse
//!     some visible            cut     exact, outside the budget
//!     all visible             open    as without a mask; a coarse block adds the mean of the bias
//! ```
//!
//! A pair is visible where a bool mask is true, or a bias is not `-inf`. The mask is read once for this, and again only where
//! a block is exact. Where it is the same for all heads or all batch items, so is the result, and it is computed once.

use half::{bf16, f16};

use super::blocks::Blocks;
use crate::error::{Error, Result};
use crate::simd::Scalar;
use crate::tensor::span;
use crate::threads;
use crate::tiles::Chunks;

/// The elements of a [`Bias`].
#[derive(Debug, Clone, Copy)]
pub enum BiasData<'a> {
    /// A mask: a key is visible where the byte is not 0.
    Bool(&'a [u8]),
    /// Added to the logits.
    F32(&'a [f32]),
    /// Added to the logits.
    F64(&'a [f64]),
    /// Added to the logits.
    Bf16(&'a [bf16]),
    /// Added to the logits.
    F16(&'a [f16]),
}

impl BiasData<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Bool(data) => data.len(),
            Self::F32(data) => data.len(),
            Self::F64(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::F16(data) => data.len(),
        }
    }
}

/// A mask or an additive bias of every pair: batch, head, query, key. `-inf` is a mask.
#[derive(Debug, Clone, Copy)]
pub struct Bias<'a> {
    data: BiasData<'a>,
    pub(crate) shape: [usize; 4],
    strides: [usize; 4],
}

impl<'a> Bias<'a> {
    /// A view of `data`; a stride of 0 repeats it.
    ///
    /// # Errors
    /// If shape and strides reach beyond `data`. `name` is the argument in the message.
    pub fn new(name: &str, data: BiasData<'a>, shape: [usize; 4], strides: [usize; 4]) -> Result<Self> {
        match span(&shape, &strides) {
            Some(needed) if needed <= data.len() => Ok(Self { data, shape, strides }),
            _ => Err(Error::new(format!(
                "{name}: shape {shape:?} with strides {strides:?} reaches beyond its {} elements",
                data.len()
            ))),
        }
    }

    /// Writes the bias of one query on the valid keys with these numbers; of a mask 0, or `-inf` where it hides the key.
    pub(crate) fn read<T: Scalar>(
        &self,
        [batch, head, query]: [usize; 3],
        keys: &Blocks,
        numbers: std::ops::Range<usize>,
        to: &mut [T],
    ) {
        let start = batch * self.strides[0] + head * self.strides[1] + query * self.strides[2];
        let step = self.strides[3];
        match self.data {
            BiasData::Bool(data) => {
                let value = |&byte: &u8| if byte == 0 { T::NEG_INFINITY } else { T::ZERO };
                gather(&data[start..], step, keys, numbers, to, value);
            }
            BiasData::F32(data) => gather(&data[start..], step, keys, numbers, to, |&x| T::from_f64(f64::from(x))),
            BiasData::F64(data) => gather(&data[start..], step, keys, numbers, to, |&x| T::from_f64(x)),
            BiasData::Bf16(data) => gather(&data[start..], step, keys, numbers, to, |&x| T::from_f64(f64::from(x))),
            BiasData::F16(data) => gather(&data[start..], step, keys, numbers, to, |&x| T::from_f64(f64::from(x))),
        }
    }
}

/// Converts the elements of the keys with these numbers, `step` apart.
#[inline(always)]
fn gather<E, T>(data: &[E], step: usize, keys: &Blocks, numbers: std::ops::Range<usize>, to: &mut [T], value: impl Fn(&E) -> T) {
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

/// What a bias makes of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No pair is visible, or there is none.
    Dead,
    /// Some pairs are visible and some are not, or the bias differs so much that its mean stands for nothing.
    Cut,
    /// All pairs are visible.
    Open,
}

/// A bias whose range within a block is larger than this is not averaged: such numbers (`-1e4`, `-1e9`, the lowest finite one)
/// are in use as masks, and next to a pair without them the weight of one with them is 0.
const WIDEST: f64 = 1e3;

/// A validated bias, and what it makes of every block.
#[derive(Debug)]
pub(crate) struct Pairs<'a> {
    pub(crate) bias: Bias<'a>,
    kinds: Vec<Kind>,
    /// The mean over the block's valid pairs where it is open; empty for a mask.
    means: Vec<f64>,
    heads: usize,
    /// How far apart the blocks of two batch items and of two heads are: 0 where they are the same.
    steps: [usize; 2],
    rows: usize,
    columns: usize,
}

/// The blocks of one head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadPairs<'a> {
    kinds: &'a [Kind],
    means: &'a [f64],
    columns: usize,
}

impl<'a> HeadPairs<'a> {
    pub(crate) fn kind(&self, i: usize, j: usize) -> Kind {
        self.kinds[i * self.columns + j]
    }

    /// The kinds of a row of blocks.
    pub(crate) fn kinds(&self, i: usize) -> &'a [Kind] {
        &self.kinds[i * self.columns..][..self.columns]
    }

    /// The mean bias of an open block; 0 for a mask.
    pub(crate) fn mean(&self, i: usize, j: usize) -> f64 {
        if self.means.is_empty() { 0.0 } else { self.means[i * self.columns + j] }
    }

    /// How many blocks are open.
    pub(crate) fn open(&self) -> usize {
        self.kinds.iter().filter(|&&kind| kind == Kind::Open).count()
    }
}

impl<'a> Pairs<'a> {
    /// Reads the bias of a problem with these blocks of queries and of keys: one for each batch item, or one for all.
    pub(crate) fn new(bias: Bias<'a>, queries: &[Blocks], keys: &[Blocks], threads: usize) -> Self {
        let [batch, heads, ..] = bias.shape;
        let (rows, columns) = (queries[0].len(), keys[0].len());
        let same_items = bias.strides[0] == 0 && queries.len() == 1 && keys.len() == 1;
        let items = if same_items { batch.min(1) } else { batch };
        let distinct_heads = if bias.strides[1] == 0 { heads.min(1) } else { heads };
        let mask = matches!(bias.data, BiasData::Bool(_));
        let mut kinds = vec![Kind::Dead; items * distinct_heads * rows * columns];
        let mut means = vec![0.0; if mask { 0 } else { kinds.len() }];
        let tasks = if columns == 0 { 0 } else { items * distinct_heads * rows };
        let (to_kinds, to_means) = (Chunks::new(&mut kinds, columns), Chunks::new(&mut means, if mask { 0 } else { columns }));
        threads::for_each(threads, tasks, Scan::default, |scan, task| {
            let (item, head, i) = (task / rows / distinct_heads, task / rows % distinct_heads, task % rows);
            let (queries, keys) = (&queries[item.min(queries.len() - 1)], &keys[item.min(keys.len() - 1)]);
            // SAFETY: each task has its own row of blocks.
            let (kinds, means) = unsafe { (to_kinds.get_mut(task), to_means.get_mut(if mask { 0 } else { task })) };
            let tokens = (queries.start(i)..queries.start(i + 1)).map(|number| queries.token(number));
            // Where all queries have the same bias, one of them tells.
            let tokens = tokens.take(if bias.strides[2] == 0 { 1 } else { usize::MAX });
            match bias.data {
                BiasData::Bool(data) => scan.mask(data, &bias, [item, head], tokens, keys, kinds),
                BiasData::F64(_) => scan.additive::<f64>(&bias, [item, head], tokens, keys, kinds, means),
                _ => scan.additive::<f32>(&bias, [item, head], tokens, keys, kinds, means),
            }
        });
        let blocks = rows * columns;
        let by_head = if distinct_heads == heads { blocks } else { 0 };
        let steps = [if items == batch { distinct_heads * blocks } else { 0 }, by_head];
        Self { bias, kinds, means, heads, steps, rows, columns }
    }

    /// The blocks of one head; heads of all batch items are numbered through.
    pub(crate) fn head(&self, head: usize) -> HeadPairs<'_> {
        let start = head / self.heads * self.steps[0] + head % self.heads * self.steps[1];
        let range = start..start + self.rows * self.columns;
        let means = if self.means.is_empty() { &[] } else { &self.means[range.clone()] };
        HeadPairs { kinds: &self.kinds[range], means, columns: self.columns }
    }

    /// Whether it is a mask, which changes nothing in an open block.
    pub(crate) fn is_mask(&self) -> bool {
        matches!(self.bias.data, BiasData::Bool(_))
    }
}

/// What is known of the blocks of a row after some of its queries.
#[derive(Debug, Default)]
struct Scan {
    bytes: Vec<u8>,
    singles: Vec<f32>,
    doubles: Vec<f64>,
    ranges: Vec<Extent>,
}

/// Of the biases of a block so far.
#[derive(Debug, Clone, Copy)]
struct Extent {
    lowest: f64,
    highest: f64,
    sum: f64,
}

impl Scan {
    fn mask(
        &mut self,
        data: &[u8],
        bias: &Bias<'_>,
        [item, head]: [usize; 2],
        tokens: impl Iterator<Item = usize>,
        keys: &Blocks,
        kinds: &mut [Kind],
    ) {
        let count = keys.start(kinds.len());
        self.bytes.resize(count, 0);
        for (index, token) in tokens.enumerate() {
            let start = item * bias.strides[0] + head * bias.strides[1] + token * bias.strides[2];
            if count > 0 {
                gather(&data[start..], bias.strides[3], keys, 0..count, &mut self.bytes, |&byte| byte);
            }
            for (j, kind) in kinds.iter_mut().enumerate() {
                let bytes = &self.bytes[keys.start(j)..keys.start(j + 1)];
                let any = bytes.iter().fold(0, |any, &byte| any | byte) != 0;
                let all = bytes.iter().fold(u8::MAX, |least, &byte| least.min(byte)) != 0;
                let found = match (bytes.is_empty(), any, all) {
                    (true, ..) | (_, false, _) => Kind::Dead,
                    (_, _, true) => Kind::Open,
                    _ => Kind::Cut,
                };
                *kind = if index == 0 || *kind == found { found } else { Kind::Cut };
            }
        }
    }

    fn additive<S: Scalar + Into<f64> + Line>(
        &mut self,
        bias: &Bias<'_>,
        [item, head]: [usize; 2],
        tokens: impl Iterator<Item = usize>,
        keys: &Blocks,
        kinds: &mut [Kind],
        means: &mut [f64],
    ) {
        let count = keys.start(kinds.len());
        let mut line = std::mem::take(S::line(self));
        line.resize(count, S::ZERO);
        self.ranges.clear();
        self.ranges.resize(kinds.len(), Extent { lowest: f64::INFINITY, highest: f64::NEG_INFINITY, sum: 0.0 });
        let mut rows = 0;
        for token in tokens {
            rows += 1;
            bias.read([item, head, token], keys, 0..count, &mut line);
            for (j, range) in self.ranges.iter_mut().enumerate() {
                let (lowest, highest, sum) = extent(&line[keys.start(j)..keys.start(j + 1)]);
                range.lowest = range.lowest.min(lowest);
                range.highest = range.highest.max(highest);
                range.sum += sum;
            }
        }
        *S::line(self) = line;
        for (j, (kind, mean)) in kinds.iter_mut().zip(means).enumerate() {
            let Extent { lowest, highest, sum } = self.ranges[j];
            // Not a number hides in neither bound, but in the sum.
            let hidden = highest == f64::NEG_INFINITY && !sum.is_nan();
            *kind = if rows == 0 || keys.count(j) == 0 || hidden {
                Kind::Dead
            } else if sum.is_nan() || highest - lowest > WIDEST || lowest.is_infinite() || highest.is_infinite() {
                Kind::Cut
            } else {
                Kind::Open
            };
            // The sum of numbers near the lowest one overflows.
            *mean = (sum / (rows * keys.count(j)).max(1) as f64).max(lowest);
        }
    }
}

/// A line of biases in the number type that it is read in.
trait Line: Sized {
    fn line(scan: &mut Scan) -> &mut Vec<Self>;
}

impl Line for f32 {
    fn line(scan: &mut Scan) -> &mut Vec<Self> {
        &mut scan.singles
    }
}

impl Line for f64 {
    fn line(scan: &mut Scan) -> &mut Vec<Self> {
        &mut scan.doubles
    }
}

/// The lowest and the highest number, NaN left out, and the sum. Eight chains let the compiler use vectors.
fn extent<S: Scalar + Into<f64>>(line: &[S]) -> (f64, f64, f64) {
    const CHAINS: usize = 8;
    let (mut lowest, mut highest, mut sums) = ([S::INFINITY; CHAINS], [S::NEG_INFINITY; CHAINS], [0.0; CHAINS]);
    let mut add = |chain: usize, x: S| {
        lowest[chain] = if x < lowest[chain] { x } else { lowest[chain] };
        highest[chain] = if x > highest[chain] { x } else { highest[chain] };
        sums[chain] += x.into();
    };
    let chunks = line.chunks_exact(CHAINS);
    let rest = chunks.remainder();
    for chunk in chunks {
        for chain in 0..CHAINS {
            add(chain, chunk[chain]);
        }
    }
    for (chain, &x) in rest.iter().enumerate() {
        add(chain, x);
    }
    let lowest = lowest.into_iter().map(Into::into).fold(f64::INFINITY, f64::min);
    let highest = highest.into_iter().map(Into::into).fold(f64::NEG_INFINITY, f64::max);
    (lowest, highest, sums.into_iter().sum())
}

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

use std::ops::Range;

use half::{bf16, f16};

use super::blocks::Blocks;
use crate::error::{Error, Result};
use crate::kernels::{Extend, ExtendMask};
use crate::simd::{Element, Level, Scalar};
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

    /// Where the biases of one query start.
    fn start(&self, [batch, head, query]: [usize; 3]) -> usize {
        batch * self.strides[0] + head * self.strides[1] + query * self.strides[2]
    }

    /// Writes the bias of one query on the valid keys with these numbers; of a mask 0, or `-inf` where it hides the key.
    pub(crate) fn read<T: Scalar>(&self, [batch, head, query]: [usize; 3], keys: &Blocks, numbers: Range<usize>, to: &mut [T]) {
        let start = self.start([batch, head, query]);
        let step = self.strides[3];
        match self.data {
            BiasData::Bool(data) => {
                let value = |&byte: &u8| if byte == 0 { T::NEG_INFINITY } else { T::ZERO };
                gather(&data[start..], step, keys, numbers, to, value);
            }
            BiasData::F32(data) => gather(&data[start..], step, keys, numbers, to, |&x| T::from_f64(f64::from(x))),
            BiasData::F64(data) => gather(&data[start..], step, keys, numbers, to, |&x| T::from_f64(x)),
            BiasData::Bf16(data) => gather_half(data, start, step, keys, numbers, to),
            BiasData::F16(data) => gather_half(data, start, step, keys, numbers, to),
        }
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
fn gather<E, T>(data: &[E], step: usize, keys: &Blocks, numbers: Range<usize>, to: &mut [T], mut value: impl FnMut(&E) -> T) {
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
    pub(crate) fn new(bias: Bias<'a>, queries: &[Blocks], keys: &[Blocks], threads: usize, level: Level) -> Self {
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
        // Below some tens of microseconds of reading, further threads bring nothing.
        let elements = items * distinct_heads * bias.shape[2] * bias.shape[3];
        threads::for_each(threads.min(elements / SCAN_THREAD + 1), tasks, Scan::default, |scan, task| {
            let (item, head, i) = (task / rows / distinct_heads, task / rows % distinct_heads, task % rows);
            let (queries, keys) = (&queries[item.min(queries.len() - 1)], &keys[item.min(keys.len() - 1)]);
            // SAFETY: each task has its own row of blocks.
            let (kinds, means) = unsafe { (to_kinds.get_mut(task), to_means.get_mut(if mask { 0 } else { task })) };
            let tokens = (queries.start(i)..queries.start(i + 1)).map(|number| queries.token(number));
            // Where all queries have the same bias, one of them tells.
            let queries = tokens.take(if bias.strides[2] == 0 { 1 } else { usize::MAX });
            let row = BlockRow { level, bias: &bias, item, head, queries, keys };
            let Scan { singles, doubles, sums, .. } = scan;
            match bias.data {
                BiasData::Bool(data) => row.scan_mask(scan, data, kinds),
                BiasData::F64(data) => row.scan(doubles, sums, Some(data), kinds, means),
                BiasData::F32(data) => row.scan(singles, sums, Some(data), kinds, means),
                BiasData::Bf16(_) | BiasData::F16(_) => row.scan(singles, sums, None, kinds, means),
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

/// Keys that are scanned together for all queries of a block: what is known of them stays in a first-level cache.
const SCAN_KEYS: usize = 1024;

/// Biases that are worth a thread.
const SCAN_THREAD: usize = 1 << 17;

/// What is known of the keys of a few blocks after some queries.
#[derive(Debug, Default)]
struct Scan {
    bytes: [Vec<u8>; 3],
    singles: [Vec<f32>; 3],
    doubles: [Vec<f64>; 3],
    sums: Vec<f64>,
}

/// One row of blocks of a bias.
struct BlockRow<'a, I> {
    level: Level,
    bias: &'a Bias<'a>,
    item: usize,
    head: usize,
    queries: I,
    keys: &'a Blocks,
}

impl<I: Iterator<Item = usize> + Clone> BlockRow<'_, I> {
    /// Calls `body` with consecutive blocks and the numbers of their keys, about [`SCAN_KEYS`] at a time.
    fn for_parts(&self, blocks: usize, mut body: impl FnMut(Range<usize>, Range<usize>)) {
        let mut start = 0;
        while start < blocks {
            let end = (start + 1..blocks).find(|&j| self.keys.start(j + 1) - self.keys.start(start) > SCAN_KEYS);
            let end = end.unwrap_or(blocks);
            body(start..end, self.keys.start(start)..self.keys.start(end));
            start = end;
        }
    }

    fn place(&self, query: usize) -> [usize; 3] {
        [self.item, self.head, query]
    }

    fn scan_mask(&self, scan: &mut Scan, data: &[u8], kinds: &mut [Kind]) {
        let [line, least, union] = &mut scan.bytes;
        self.for_parts(kinds.len(), |blocks, numbers| {
            line.resize(numbers.len(), 0);
            refill(least, numbers.len(), u8::MAX);
            refill(union, numbers.len(), 0);
            for query in self.queries.clone() {
                let start = self.bias.start(self.place(query));
                let mask = in_place(data, start, self.bias.strides[3], self.keys, numbers.clone()).unwrap_or_else(|| {
                    gather(&data[start..], self.bias.strides[3], self.keys, numbers.clone(), line, |&byte| byte);
                    line
                });
                f32::run(self.level, ExtendMask { mask, least, union });
            }
            for j in blocks {
                let keys = self.keys.start(j) - numbers.start..self.keys.start(j + 1) - numbers.start;
                kinds[j] = if union[keys.clone()].iter().all(|&byte| byte == 0) {
                    Kind::Dead
                } else if least[keys].iter().all(|&byte| byte != 0) {
                    Kind::Open
                } else {
                    Kind::Cut
                };
            }
        });
    }

    fn scan<S: Scalar + Into<f64>>(
        &self,
        lines: &mut [Vec<S>; 3],
        sums: &mut Vec<f64>,
        data: Option<&[S]>,
        kinds: &mut [Kind],
        means: &mut [f64],
    ) {
        let [line, minus_lowest, highest] = lines;
        let rows = self.queries.clone().count();
        self.for_parts(kinds.len(), |blocks, numbers| {
            line.resize(numbers.len(), S::ZERO);
            refill(minus_lowest, numbers.len(), S::NEG_INFINITY);
            refill(highest, numbers.len(), S::NEG_INFINITY);
            refill(sums, numbers.len(), 0.0);
            for query in self.queries.clone() {
                let start = self.bias.start(self.place(query));
                let row = data.and_then(|data| in_place(data, start, self.bias.strides[3], self.keys, numbers.clone()));
                let bias = row.unwrap_or_else(|| {
                    self.bias.read(self.place(query), self.keys, numbers.clone(), line);
                    line
                });
                S::run(self.level, Extend { bias, highest, minus_lowest, sums });
            }
            for j in blocks {
                let keys = self.keys.start(j) - numbers.start..self.keys.start(j + 1) - numbers.start;
                let largest = |bounds: &[S]| bounds.iter().map(|&x| x.into()).fold(f64::NEG_INFINITY, f64::max);
                let (highest, lowest) = (largest(&highest[keys.clone()]), -largest(&minus_lowest[keys.clone()]));
                let sum: f64 = sums[keys.clone()].iter().sum();
                kinds[j] = kind_of(lowest, highest, sum, rows * keys.len());
                // The sum of numbers near the lowest one overflows.
                means[j] = (sum / (rows * keys.len()).max(1) as f64).max(lowest);
            }
        });
    }
}

/// What a block is whose biases have these bounds (NaN left out), this sum and this number.
fn kind_of(lowest: f64, highest: f64, sum: f64, count: usize) -> Kind {
    if count == 0 || (highest == f64::NEG_INFINITY && !sum.is_nan()) {
        Kind::Dead
    } else if sum.is_nan() || lowest.is_infinite() || highest.is_infinite() || highest - lowest > WIDEST {
        Kind::Cut
    } else {
        Kind::Open
    }
}

/// Makes `count` elements `value`.
fn refill<T: Copy>(elements: &mut Vec<T>, count: usize, value: T) {
    elements.clear();
    elements.resize(count, value);
}

/// The elements of the keys with these numbers, if they lie together.
fn in_place<'a, E>(data: &'a [E], start: usize, step: usize, keys: &Blocks, numbers: Range<usize>) -> Option<&'a [E]> {
    if numbers.is_empty() {
        return Some(&[]);
    }
    (step == 1 && keys.consecutive(numbers.clone())).then(|| &data[start + keys.token(numbers.start)..][..numbers.len()])
}

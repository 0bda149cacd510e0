//! The keys of a block as 8-bit codes of what they differ from their mean: what blocks are ranked by where `score` is the largest
//! logit (docs/definitions.md, section 4).

use crate::exec::{Buffer, Chunks, threads};
use crate::kernels::{Deviate, Encode};
use crate::mra::problem::{Batch, Blocks, Problem};
use crate::mra::pyramid::Means;
use crate::simd::{CODE_BIAS, CODE_LANES, CodeLine, Element, Level, Scalar};
use crate::tensor::{Rows, Tensor};

/// Channels of a group, which is kept or left out as a whole.
pub(crate) const CHANNELS: usize = 4;

/// At most so many groups are all kept: with 64 channels the products of a block cost no more than the choice of groups would save.
const FEW_GROUPS: usize = 16;

/// Candidates for each block that is chosen, at least: twice as many find little more, half as many miss a tenth of the gain.
pub(crate) const CANDIDATES: usize = 4;

/// The codes of a block.
pub(crate) struct BlockCodes<'a, T> {
    /// For each kept group the lines of all keys.
    pub(crate) lines: &'a [CodeLine],
    /// The kept groups, ascending.
    pub(crate) groups: &'a [u32],
    /// For each line of keys, minus [`CODE_BIAS`] times the sum of the codes of a key.
    pub(crate) corrections: &'a [[i32; CODE_LANES]],
    /// What a code of 1 stands for.
    pub(crate) unit: T,
}

/// The codes of some blocks.
pub(crate) struct KeyCodes<T> {
    shape: Shape,
    lines: Vec<CodeLine>,
    groups: Vec<u32>,
    corrections: Vec<[i32; CODE_LANES]>,
    units: Vec<T>,
}

/// What all blocks have in common.
#[derive(Debug, Clone, Copy)]
struct Shape {
    level: Level,
    block_size: usize,
    channels: usize,
    /// Groups of channels.
    groups: usize,
    /// How many of them a block keeps.
    kept: usize,
    /// Lines of the keys of a block.
    width: usize,
}

impl Shape {
    fn new(problem: &Problem<'_>) -> Self {
        let groups = problem.head_dim.div_ceil(CHANNELS);
        let kept = groups.div_ceil(2).max(FEW_GROUPS).min(groups);
        let width = problem.block_size.div_ceil(CODE_LANES);
        Self { level: problem.level, block_size: problem.block_size, channels: problem.head_dim, groups, kept, width }
    }
}

impl<T: Scalar> KeyCodes<T> {
    /// Room for a number of blocks.
    fn new(shape: Shape, blocks: usize) -> Self {
        Self {
            shape,
            lines: vec![CodeLine([[0; CHANNELS]; CODE_LANES]); blocks * shape.kept * shape.width],
            groups: vec![0; blocks * shape.kept],
            corrections: vec![[0; CODE_LANES]; blocks * shape.width],
            units: vec![T::ZERO; blocks],
        }
    }

    /// Those of every block, by its flat index; `None` where so few queries choose that fewer blocks are candidates.
    pub(crate) fn of_all<E: Element<Compute = T>>(
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        key: &Tensor<'_, E>,
        means: &Means<'_, T>,
    ) -> Option<Self> {
        let candidates = |group: usize| {
            let segment = batch.segment_of_group(group);
            let queries = segment.rows.tokens().len() * batch.heads_of(group).len();
            queries.saturating_mul(CANDIDATES * problem.plan_width(segment))
        };
        if (0..batch.groups()).map(candidates).fold(0, usize::saturating_add) < batch.columns() {
            return None;
        }
        let shape = Shape::new(problem);
        let mut codes = Self::new(shape, batch.columns());
        let lines = Chunks::new(&mut codes.lines, shape.kept * shape.width);
        let groups = Chunks::new(&mut codes.groups, shape.kept);
        let corrections = Chunks::new(&mut codes.corrections, shape.width);
        let units = Chunks::new(&mut codes.units, 1);
        let elements = batch.columns().saturating_mul(problem.block_size * problem.head_dim);
        threads::for_each(
            problem.threads_to_read(elements),
            batch.columns(),
            || Encoder::new(problem),
            |encoder, task| {
                let (group, block) = batch.column_at(task);
                let (item, kv_head) = batch.item_and_kv_head(group);
                let means = means.keys(batch, group);
                // A cache has no mean of a block that is not complete, and nobody chooses that.
                if block < means.len() {
                    let (rows, blocks) = (key.head(item, kv_head), &batch.segment_of_group(group).keys);
                    encoder.encode(&rows, blocks, block, means.row(block));
                    // SAFETY: each task has its own block.
                    unsafe {
                        lines.get_mut(task).copy_from_slice(&encoder.codes.lines);
                        groups.get_mut(task).copy_from_slice(&encoder.codes.groups);
                        corrections.get_mut(task).copy_from_slice(&encoder.codes.corrections);
                        units.get_mut(task).copy_from_slice(&encoder.codes.units);
                    }
                }
            },
        );
        Some(codes)
    }

    /// Those of one block.
    pub(crate) fn block(&self, index: usize) -> BlockCodes<'_, T> {
        let Shape { kept, width, .. } = self.shape;
        BlockCodes {
            lines: &self.lines[index * kept * width..][..kept * width],
            groups: &self.groups[index * kept..][..kept],
            corrections: &self.corrections[index * width..][..width],
            unit: self.units[index],
        }
    }
}

/// Makes the codes of one block at a time.
pub(crate) struct Encoder<T> {
    /// Those of the block.
    codes: KeyCodes<T>,
    /// What each key differs from the mean, in rows of whole groups.
    differences: Buffer<T>,
    mean: Buffer<T>,
    squares: Buffer<T>,
    rows: Vec<u8>,
    order: Vec<u32>,
}

impl<T: Scalar> Encoder<T> {
    pub(crate) fn new(problem: &Problem<'_>) -> Self {
        let shape = Shape::new(problem);
        let stride = shape.groups * CHANNELS;
        Self {
            codes: KeyCodes::new(shape, 1),
            differences: Buffer::zeros(shape.block_size * stride),
            mean: Buffer::zeros(stride),
            squares: Buffer::zeros(stride),
            rows: vec![0; shape.block_size * stride],
            order: Vec::new(),
        }
    }

    /// The codes of a block with at least one valid key, given its mean.
    pub(crate) fn encode<E: Element<Compute = T>>(
        &mut self,
        rows: &Rows<'_, E>,
        blocks: &Blocks,
        block: usize,
        mean: &[T],
    ) -> BlockCodes<'_, T> {
        let Shape { level, channels, groups, .. } = self.codes.shape;
        let (numbers, stride) = (blocks.numbers(block), groups * CHANNELS);
        if stride > 0 {
            self.mean[..channels].copy_from_slice(&mean[..channels]);
            let differences = &mut self.differences[..numbers.len() * stride];
            for (row, number) in differences.chunks_exact_mut(stride).zip(numbers.clone()) {
                E::widen(rows.row(blocks.token(number)), &mut row[..channels]);
                row[channels..].fill(T::ZERO);
            }
            T::run(level, Deviate { rows: differences, mean: &self.mean, squares: &mut self.squares });
            let codes = &mut self.rows[..numbers.len() * stride];
            self.codes.units[0] = T::run(level, Encode { row: differences, factor: T::from_f64(1.0), bias: 0, codes });
            self.keep_groups();
            self.lay_out(numbers.len());
        }
        self.codes.block(0)
    }

    /// The groups in which keys differ most from their mean; of equal ones the first.
    fn keep_groups(&mut self) {
        let Shape { groups, kept, .. } = self.codes.shape;
        let square = |group: u32| {
            let squares = &self.squares[group as usize * CHANNELS..][..CHANNELS];
            squares.iter().fold(T::ZERO, |sum, &square| sum + square)
        };
        self.order.clear();
        self.order.extend(0..u32::try_from(groups).expect("fewer than 2^32 channels"));
        if kept < groups {
            let compare = |&a: &u32, &b: &u32| square(b).total_cmp(&square(a)).then(a.cmp(&b));
            self.order.select_nth_unstable_by(kept - 1, compare);
        }
        self.order.truncate(kept);
        self.order.sort_unstable();
        self.codes.groups.copy_from_slice(&self.order);
    }

    /// Brings the codes of the kept groups into lines. The last lines are filled up with the first key, which changes no maximum.
    fn lay_out(&mut self, keys: usize) {
        let Shape { groups, width, .. } = self.codes.shape;
        let stride = groups * CHANNELS;
        for sums in &mut self.codes.corrections {
            sums.fill(0);
        }
        for (lines, &group) in self.codes.lines.chunks_exact_mut(width).zip(&self.codes.groups) {
            for (place, word) in lines.iter_mut().flat_map(|line| &mut line.0).enumerate() {
                let key = if place < keys { place } else { 0 };
                let codes = &self.rows[key * stride + group as usize * CHANNELS..][..CHANNELS];
                let correction = &mut self.codes.corrections[place / CODE_LANES][place % CODE_LANES];
                for (code, &stored) in word.iter_mut().zip(codes) {
                    *code = stored.cast_signed();
                    *correction -= i32::from(CODE_BIAS) * i32::from(*code);
                }
            }
        }
    }
}

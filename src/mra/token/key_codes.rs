//! 8-bit codes of what the members of a block differ from its mean, by which blocks are ranked where `score` is the largest logit
//! (docs/definitions.md, sections 4.1 and 5).

use super::levels::TokenLevel;
use super::members::{Members, most_members};
use crate::exec::{Buffer, Chunks, threads};
use crate::kernels::{Deviate, Encode};
use crate::mra::problem::Problem;
use crate::simd::{CODE_BIAS, CODE_LANES, CodeLine, Element, Level, Scalar};
use crate::tensor::Tensor;

/// Channels of a group, which is kept or left out as a whole.
pub(crate) const CHANNELS: usize = 4;

/// At most so many groups are all kept: with 64 channels the products of a block cost no more than the choice of groups would save.
const FEW_GROUPS: usize = 16;

/// Candidates for each block that is chosen, at least: twice as many find little more, half as many miss a tenth of the gain.
pub(crate) const CANDIDATES: usize = 4;

/// The codes of a block.
pub(crate) struct BlockCodes<'a, T> {
    /// For each kept group the lines of all members.
    pub(crate) lines: &'a [CodeLine],
    /// The kept groups, ascending.
    pub(crate) groups: &'a [u32],
    /// For each line of members, minus [`CODE_BIAS`] times the sum of the codes of a member.
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
    /// Members of a block, at most.
    members: usize,
    channels: usize,
    /// Groups of channels.
    groups: usize,
    /// How many of them a block keeps.
    kept: usize,
    /// Lines of the members of a block.
    width: usize,
}

impl Shape {
    fn new(problem: &Problem<'_>, members: usize) -> Self {
        let groups = problem.head_dim.div_ceil(CHANNELS);
        let kept = groups.div_ceil(2).max(FEW_GROUPS).min(groups);
        let width = members.div_ceil(CODE_LANES);
        Self { level: problem.level, members, channels: problem.head_dim, groups, kept, width }
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

    /// Those of every block of a level, by its flat index; `None` where so few queries choose that fewer blocks are candidates, or
    /// none since all blocks are taken.
    /// `below` is the level of the blocks that a block consists of, if it is not the finest one.
    pub(crate) fn of_all<E: Element<Compute = T>>(
        level: &TokenLevel<'_, T>,
        below: Option<&TokenLevel<'_, T>>,
        key: &Tensor<'_, E>,
    ) -> Option<Self> {
        let TokenLevel { problem, batch, means } = level;
        let means = means.as_ref().filter(|_| !problem.budget.is_everything())?;
        let candidates = |group: usize| {
            let segment = batch.segment_of_group(group);
            let queries = segment.rows.tokens().len() * batch.heads_of(group).len();
            queries.saturating_mul(CANDIDATES.saturating_mul(problem.plan_width(segment)))
        };
        if (0..batch.groups()).map(candidates).fold(0, usize::saturating_add) < batch.columns() {
            return None;
        }
        let shape = Shape::new(problem, most_members(level, below));
        let mut codes = Self::new(shape, batch.columns());
        let lines = Chunks::new(&mut codes.lines, shape.kept * shape.width);
        let groups = Chunks::new(&mut codes.groups, shape.kept);
        let corrections = Chunks::new(&mut codes.corrections, shape.width);
        let units = Chunks::new(&mut codes.units, 1);
        let elements = batch.columns().saturating_mul(shape.members * problem.head_dim);
        threads::for_each(
            problem.threads_to_read(elements),
            batch.columns(),
            || Encoder::new(problem, shape.members),
            |encoder, task| {
                let (group, block) = batch.column_at(task);
                let means = means.keys(batch, group);
                // A cache has no mean of a block that is not complete, and nobody chooses that.
                if block < means.len() {
                    encoder.encode(&Members::of_group(level, below, key, group), block, means.row(block));
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
    /// What each member differs from the mean, in rows of whole groups.
    differences: Buffer<T>,
    mean: Buffer<T>,
    squares: Buffer<T>,
    rows: Vec<u8>,
    order: Vec<u32>,
    /// The codes of a member in the kept groups.
    kept: Vec<[i8; CHANNELS]>,
}

impl<T: Scalar> Encoder<T> {
    /// For blocks of at most so many members.
    pub(crate) fn new(problem: &Problem<'_>, members: usize) -> Self {
        let shape = Shape::new(problem, members);
        let stride = shape.groups * CHANNELS;
        Self {
            codes: KeyCodes::new(shape, 1),
            differences: Buffer::zeros(members * stride),
            mean: Buffer::zeros(stride),
            squares: Buffer::zeros(stride),
            rows: vec![0; members * stride],
            order: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// The codes of a block with at least one valid key, given its mean.
    pub(crate) fn encode<E: Element<Compute = T>>(
        &mut self,
        members: &Members<'_, E>,
        block: usize,
        mean: &[T],
    ) -> BlockCodes<'_, T> {
        let Shape { level, channels, groups, .. } = self.codes.shape;
        let stride = groups * CHANNELS;
        if stride > 0 {
            self.mean[..channels].copy_from_slice(&mean[..channels]);
            // What fills up the last group stays 0: both of it and of the mean are.
            let rows = self.differences.chunks_exact_mut(stride).map(|row| &mut row[..channels]);
            let count = members.read(block, rows);
            let differences = &mut self.differences[..count * stride];
            T::run(level, Deviate { rows: differences, mean: &self.mean, squares: &mut self.squares });
            let codes = &mut self.rows[..count * stride];
            self.codes.units[0] = T::run(level, Encode { row: differences, factor: T::from_f64(1.0), bias: 0, codes });
            self.keep_groups();
            self.lay_out(count);
        }
        self.codes.block(0)
    }

    /// The groups in which members differ most from their mean; of equal ones the first.
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

    /// Brings the codes of the kept groups into lines. The last lines are filled up with the first member, which changes no maximum.
    fn lay_out(&mut self, members: usize) {
        let Shape { groups, width, .. } = self.codes.shape;
        let (rows, _) = self.rows.as_chunks::<CHANNELS>();
        for place in 0..width * CODE_LANES {
            let member = if place < members { place } else { 0 };
            let row = &rows[member * groups..][..groups];
            self.kept.clear();
            self.kept.extend(self.codes.groups.iter().map(|&group| row[group as usize].map(u8::cast_signed)));
            let (line, lane) = (place / CODE_LANES, place % CODE_LANES);
            for (to, &codes) in self.codes.lines[line..].iter_mut().step_by(width).zip(&self.kept) {
                to.0[lane] = codes;
            }
            // By themselves: the compiler makes vectors of it.
            let sum: i32 = self.kept.as_flattened().iter().map(|&code| i32::from(code)).sum();
            self.codes.corrections[line][lane] = -i32::from(CODE_BIAS) * sum;
        }
    }
}

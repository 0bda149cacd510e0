//! The levels of a call, from the coarsest blocks to the finest ones.

use std::ops::Range;

use crate::mra::inputs::Inputs;
use crate::mra::problem::{Batch, Form, Problem, Sight};
use crate::mra::pyramid::{Means, PooledInputs};
use crate::mra::select::{is_refined, number};
use crate::simd::Element;

/// One level.
pub(crate) struct TokenLevel<'a, T> {
    pub(crate) problem: &'a Problem<'a>,
    pub(crate) batch: Batch<'a>,
    /// Means of its blocks, if they are needed.
    pub(crate) means: Option<Means<'a, T>>,
}

/// Which means a call needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    Nothing,
    Keys,
    KeysAndValues,
}

/// The levels of a call, the coarsest first. `given` are the means that the caller brings, one for each level, or else they are those of the
/// inputs. Where everything is exact there is one level, without means.
pub(crate) fn levels<'a, E: Element>(
    problem: &'a Problem<'a>,
    inputs: &Inputs<'_, E>,
    given: Option<&[PooledInputs<'a, E::Compute>]>,
    wanted: Wanted,
) -> Vec<TokenLevel<'a, E::Compute>> {
    if problem.is_everything() {
        return vec![TokenLevel { problem, batch: Batch::new(problem, Form::Token), means: None }];
    }
    let mut levels: Vec<TokenLevel<'a, E::Compute>> = Vec::new();
    for (index, problem) in problem.levels().enumerate().rev() {
        let batch = Batch::new(problem, Form::Token);
        let (given, with_values) = (given.map(|given| &given[index]), wanted == Wanted::KeysAndValues);
        let means = (wanted != Wanted::Nothing).then(|| match levels.last() {
            Some(TokenLevel { problem: below, batch: batch_below, means: Some(means) }) if given.is_none() => {
                means.coarsen(&batch, (below, batch_below))
            }
            _ => Means::new(problem, &batch, inputs, given, with_values),
        });
        levels.push(TokenLevel { problem, batch, means });
    }
    levels.reverse();
    levels
}

/// Multiplications of all queries of a head with the means of the coarsest level, and with those of the children of what they refine.
pub(crate) fn candidates<T>(levels: &[TokenLevel<'_, T>]) -> usize {
    let mut count = 0usize;
    for (index, level) in levels.iter().enumerate() {
        for (at, segment) in level.batch.segments.iter().enumerate() {
            let above = index.checked_sub(1).map(|above| &levels[above]);
            let refined = above.map(|above| above.problem.plan_width(above.batch.segments[at]));
            let blocks = refined.zip(level.problem.children()).map_or(segment.keys.len(), |(width, children)| width * children);
            count = count.saturating_add(segment.rows.tokens().len().saturating_mul(blocks));
        }
    }
    count
}

impl<T> TokenLevel<'_, T> {
    /// Where the plan of a range of queries of a flat head lies.
    pub(crate) fn plan_bytes(&self, head: usize, range: &Range<usize>) -> Range<usize> {
        let segment = self.batch.segment(head);
        let (_, head_of_item) = self.batch.item_and_head(head);
        let (width, first) = (self.problem.plan_width(segment), range.start - segment.rows.tokens().start);
        let place = self.problem.plan_range(segment, head_of_item).start + 4 * first * width;
        place..place + 4 * range.len() * width
    }
}

/// What the queries of a range see of the blocks of a level, and their plan.
#[derive(Default)]
pub(crate) struct LevelOfRange<'a> {
    pub(crate) sights: Vec<Sight<'a>>,
    pub(crate) plan: Vec<i32>,
    /// How many numbers of the plan each query has.
    pub(crate) width: usize,
}

impl<'a> LevelOfRange<'a> {
    /// Finds out what the queries of a flat head see; those that are `idle` see nothing.
    pub(crate) fn see<T>(
        &mut self,
        level: &TokenLevel<'a, T>,
        head: usize,
        range: &Range<usize>,
        idle: impl Fn(usize) -> bool,
    ) {
        let segment = level.batch.segment(head);
        let (_, head_of_item) = level.batch.item_and_head(head);
        let sight =
            |token: usize| if idle(token) { Sight::default() } else { level.problem.sight(segment, head_of_item, token) };
        self.sights.clear();
        self.sights.extend(range.clone().map(sight));
        self.width = level.problem.plan_width(segment);
    }
}

/// Reads the plan of a level, of which and of those above it is known what the queries see. In a ladder it keeps of it what can be: blocks
/// that a query sees all of and that lie in a block which it refines above, ascending and each once.
pub(crate) fn read_plan<T>(of_range: &mut [LevelOfRange<'_>], index: usize, level: &TokenLevel<'_, T>, bytes: &[u8]) {
    let is_ladder = of_range.len() > 1;
    let (above, from) = of_range.split_at_mut(index);
    let LevelOfRange { sights, plan, width } = &mut from[0];
    plan.clear();
    plan.extend(bytes.chunks_exact(4).map(number));
    if !is_ladder {
        return;
    }
    let children = level.problem.children().unwrap_or(1);
    for (query, (sight, row)) in sights.iter().zip(plan.chunks_exact_mut((*width).max(1))).enumerate() {
        let can_be = |number: i32| {
            let block = usize::try_from(number).ok().filter(|&block| sight.is_open(block));
            block.is_some_and(|block| above.last().is_none_or(|above| above.refines(query, block / children)))
        };
        keep(row, can_be);
    }
}

impl LevelOfRange<'_> {
    /// Whether a query refines a block: it is cut, or the plan names it.
    fn refines(&self, query: usize, block: usize) -> bool {
        is_refined(&self.sights[query], &self.plan[query * self.width..][..self.width], block)
    }
}

/// Leaves numbers that can be, ascending and each once, and then -1.
fn keep(row: &mut [i32], can_be: impl Fn(i32) -> bool) {
    let len = row.iter().position(|&number| number < 0).unwrap_or(row.len());
    if row[..len].is_sorted_by(|a, b| a < b) && row[..len].iter().all(|&number| can_be(number)) {
        // As in every plan that was chosen.
        row[len..].fill(-1);
        return;
    }
    let mut kept: Vec<i32> = row.iter().copied().filter(|&number| can_be(number)).collect();
    kept.sort_unstable();
    kept.dedup();
    row.fill(-1);
    row[..kept.len()].copy_from_slice(&kept);
}

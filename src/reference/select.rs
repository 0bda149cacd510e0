//! Which blocks the rows of a head choose: sections 3.1 to 3.5 and 4.1 to 4.4 of the definitions.

use std::cmp::Ordering;

use ndarray::Array2;

use super::Form;
use super::head::Head;
use super::score::rank;
use super::segment::Kind;
use crate::Budget;

/// The exact blocks of head number `h`.
pub(super) fn select(head: &Head<'_>, budget: &Budget, h: usize) -> Array2<bool> {
    let rate = budget.blocks_per_row[h.min(budget.blocks_per_row.len() - 1)];
    match head.segment.form {
        Form::Block => block_form(head, budget, rate),
        Form::Token => token_form(head, budget, rate),
    }
}

fn block_form(head: &Head<'_>, budget: &Budget, rate: f64) -> Array2<bool> {
    let (segment, kinds, c) = (head.segment, head.kinds(), head.pooled_logits());
    let first_blocks = budget.first_blocks.unwrap_or(0) as i128;
    let mut selected = Array2::from_elem(c.raw_dim(), false);
    let (mut candidates, mut beyond) = (Vec::new(), Vec::new());
    for (row, i) in (0..c.nrows()).zip(segment.first_row..) {
        let open: Vec<usize> = (0..c.ncols()).filter(|&j| kinds[[row, j]] == Kind::Open).collect();
        let best = open.iter().map(|&j| c[[row, j]]).fold(f64::NEG_INFINITY, f64::max);
        // Without a number among the logits, the first block is as good as any.
        let first_best = open.iter().copied().find(|&j| c[[row, j]] == best).or(open.first().copied());
        if !segment.rows[row].live {
            beyond.push((row, first_best));
            continue;
        }
        for &j in &open {
            let (column, distance) = (j as i128, (i - j as i128).unsigned_abs());
            let near = (budget.diagonal_blocks > 0 && distance <= budget.diagonal_blocks as u128 / 2)
                || (budget.local_blocks > 1 && distance < budget.local_blocks as u128);
            let first = i < first_blocks || column < first_blocks;
            if near || first || Some(j) == first_best {
                selected[[row, j]] = true;
            } else {
                candidates.push((c[[row, j]] - best, row, j));
            }
        }
    }
    let forced = selected.iter().filter(|&&exact| exact).count();
    let wanted = budget.num_blocks.unwrap_or_else(|| rounded(rate * segment.query_blocks as f64));
    let all = candidates.len() <= wanted.saturating_sub(forced);
    // The highest score first; among equal ones the lower row, then the lower block.
    candidates.sort_by(|a, b| higher_first(a.0, b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    for (_, row, j) in candidates.into_iter().take(wanted.saturating_sub(forced)) {
        selected[[row, j]] = true;
    }
    for (row, first_best) in beyond {
        for j in 0..c.ncols() {
            selected[[row, j]] = kinds[[row, j]] == Kind::Open && (all || Some(j) == first_best);
        }
    }
    selected
}

fn token_form(head: &Head<'_>, budget: &Budget, rate: f64) -> Array2<bool> {
    let (segment, kinds, c) = (head.segment, head.kinds(), head.pooled_logits());
    let first_blocks = budget.first_blocks.unwrap_or(1);
    let by_diagonal = if budget.diagonal_blocks > 0 { budget.diagonal_blocks / 2 + 1 } else { 1 };
    let local_blocks = budget.local_blocks.max(by_diagonal) as u128;
    let rate = budget.num_blocks.map_or(rate, |number| number as f64 / segment.query_blocks.max(1) as f64);
    let wanted = rounded(rate).max(1);
    let mut selected = Array2::from_elem(c.raw_dim(), false);
    for t in 0..c.nrows() {
        let seen: Vec<usize> = (0..c.ncols()).filter(|&j| kinds[[t, j]] != Kind::Dead).collect();
        let mut candidates = Vec::new();
        for (place, &j) in seen.iter().enumerate() {
            let local = (segment.own_block(t) - j as i128).unsigned_abs() < local_blocks;
            if kinds[[t, j]] == Kind::Cut || local || place < first_blocks {
                selected[[t, j]] = true;
            } else {
                candidates.push(j);
            }
        }
        let forced = seen.len() - candidates.len();
        let take = wanted.saturating_sub(forced);
        rank(head, None, t, c.row(t), take, &mut candidates);
        for j in candidates.into_iter().take(take) {
            selected[[t, j]] = true;
        }
    }
    selected
}

/// Half up.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive; more blocks than there are mean all")]
pub(super) fn rounded(rate: f64) -> usize {
    (rate + 0.5).floor() as usize
}

/// NaN is behind every number, and -0 is 0.
pub(super) fn higher_first(a: f64, b: f64) -> Ordering {
    a.is_nan().cmp(&b.is_nan()).then((b + 0.0).total_cmp(&(a + 0.0)))
}

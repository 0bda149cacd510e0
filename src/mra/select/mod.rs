//! Which blocks are computed exactly: scores, choices, and the plan that holds them.

mod block_plan;
mod child_candidates;
mod children;
mod per_child;
mod per_row;
mod per_token;
mod per_token_child;
mod plan;
mod plan_arrays;
mod scores;

pub(crate) use block_plan::{BlockPlan, selected};
pub(crate) use child_candidates::Listed;
pub(crate) use children::Children;
pub(crate) use per_child::select_children;
pub(crate) use per_row::{select_rows, select_rows_then};
pub(crate) use per_token::{Chooser, is_refined};
pub(crate) use per_token_child::ChildChooser;
pub(crate) use plan::{LevelPlace, child_columns, number};
pub(crate) use scores::{Scores, add_mean_bias};

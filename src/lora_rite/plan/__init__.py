"""What is stepped: names, pairs, how parameters hold factors, their state, and the plan that a step follows."""
